//! The crates that are mutated, and the tests that must detect the mutants.

/// The test files of a crate, in tiers. The first tier detects most mutants in little time. Mutants
/// that a tier does not detect are tested with the next one.
pub(crate) type Tiers = &'static [&'static [&'static str]];

/// A crate that is mutated.
pub(crate) struct Mutated {
    pub name: &'static str,
    /// The percentage of its mutants that must be caught.
    pub goal: usize,
    /// The files that are mutated, as a pattern of cargo-mutants. `None` stands for all files.
    pub files: Option<&'static str>,
    /// The code for macOS is compiled for Linux and runs over `testing/fake-hvf`.
    pub over_fake_hvf: bool,
    pub tiers: Tiers,
}

impl Mutated {
    const fn all_of(name: &'static str, tiers: Tiers) -> Self {
        Self {
            name,
            goal: 90,
            files: None,
            over_fake_hvf: false,
            tiers,
        }
    }
}

/// The crates in which a defect can lose a page, and their test files.
pub(crate) const CRATES: [Mutated; 7] = [
    Mutated::all_of(
        "atomic-file",
        &[
            &[
                "destinations",
                "group",
                "magic_links",
                "power_loss",
                "records",
                "recovery",
            ],
            &[
                "recycling",
                "recycling_in_use",
                "recycling_races",
                "replace",
            ],
            &[
                "concurrency",
                "hostile",
                "hostile_records",
                "hostile_sweeps",
            ],
            &["obstacles", "orphans", "staged_files"],
            &["preflight", "preserve", "preserve_access", "replace_only"],
            &["user_namespaces"],
            &["events", "faults", "kills", "write"],
            &["group_faults"],
        ],
    ),
    Mutated::all_of(
        "dirty-bitmap",
        &[&[
            "allocations",
            "contents",
            "epochs",
            "logged",
            "loom",
            "loom_epochs",
            "loom_tracker",
            "marking",
            "oracle",
            "rebuild",
            "tracking",
            "vm_memory",
        ]],
    ),
    Mutated::all_of(
        "memory-writer",
        &[
            &[
                "bad_input",
                "destinations",
                "in_order",
                "in_order_oracle",
                "layout_errors",
                "layouts",
            ],
            &["oracle", "process", "progress", "snapshots"],
            &["engine_choice", "events"],
            &[
                "ambiguous",
                "device_writes",
                "open_file",
                "recycling",
                "resident",
            ],
            &[
                "reader_size",
                "regions",
                "replaced_parent",
                "skipping",
                "skipping_oracle",
                "stale_parent",
                "stream",
                "stream_errors",
            ],
            &["claimed_ram", "memory", "releasing", "untouched", "zeros"],
        ],
    ),
    Mutated::all_of(
        "memory-image",
        &[
            &[
                "mapped_chain",
                "sealed",
                "identity",
                "links",
                "verification",
                "verified_chain",
            ],
            &["chains", "damage", "raw_diffs", "restore_targets"],
            &["bad_input", "call_orders", "comparison", "oracle"],
            &["secrets"],
            &["chain_memory", "claimed_ram", "diff_chains", "long_chains"],
            &[
                "changed_images",
                "merged_seals",
                "open_files",
                "pathless",
                "ram_start",
            ],
            &["checksum_secrets", "events", "guest_targets"],
            &["replaced_images", "stored_zeros", "zeroed"],
        ],
    ),
    Mutated::all_of(
        "lazy-restore",
        &[
            &["filling", "memory", "sharing", "split", "start", "waiting"],
            &["changed_images", "claimed_ram", "kvm", "long_chains"],
            &["hostile_clients", "server", "server_oracle"],
            &[
                "oracle",
                "saves",
                "secrets",
                "signals",
                "sources",
                "unprivileged",
            ],
            &["events"],
        ],
    ),
    Mutated::all_of(
        "live-snapshot",
        &[
            &["discards", "handler", "hvf", "limits", "precopy"],
            &[
                "cancellation",
                "consistency",
                "processes",
                "tracked_pages",
                "trackers",
            ],
        ],
    ),
    // Its other modules run on all systems. Most of their tests need no framework.
    Mutated {
        name: "hvf-backend",
        goal: 85,
        files: Some("crates/hvf-backend/src/macos/**"),
        over_fake_hvf: true,
        tiers: &[
            &[
                "exits",
                "fake_adoption",
                "fake_features",
                "fake_framework",
                "fake_gic",
                "fake_registers",
                "fake_start",
                "fake_state",
                "fake_translation",
                "hypervisor",
                "injected_faults",
                "recorded_syndromes",
            ],
            &["fake_interrupts", "fake_pause", "fake_vcpus"],
        ],
    },
];

/// Returns the names of the crates that are mutated.
pub(crate) fn crates() -> [&'static str; CRATES.len()] {
    CRATES.map(|mutated| mutated.name)
}

#[cfg(test)]
mod tests {
    use xshell::Shell;

    use super::*;

    #[test]
    fn all_test_files_are_run() {
        let sh = Shell::new().expect("a shell");
        let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates");
        for Mutated { name, tiers, .. } in CRATES {
            let files = sh.read_dir(format!("{crates}/{name}/tests"));
            let mut files: Vec<_> = files
                .expect("tests")
                .into_iter()
                .filter(|file| {
                    file.extension().is_some_and(|ext| ext == "rs") || file.join("main.rs").exists()
                })
                .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
                .collect();
            files.sort();
            let mut run = tiers.concat();
            run.sort_unstable();
            assert_eq!(run, files, "{name}");
        }
    }
}
