//! `cargo xtask mutants`: makes small changes to the code, and checks that the tests detect them.

use std::ops::AddAssign;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use harness::packages::Install;
use harness::record::Record;
use xshell::{Shell, cmd};

use crate::cargo_tool::CargoTool;

const TOOL: CargoTool = CargoTool {
    name: "cargo-mutants",
    version: "27.1.0",
    wheel: None,
};

/// The test files of a crate, in tiers. The first tier detects most mutants in little time. Mutants
/// that a tier does not detect are tested with the next one.
type Tiers = &'static [&'static [&'static str]];

/// The crates in which a defect can lose a page, and their test files.
const CRATES: [(&str, Tiers); 5] = [
    (
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
    (
        "dirty-bitmap",
        &[&[
            "allocations",
            "contents",
            "epochs",
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
    (
        "memory-writer",
        &[
            &["bad_input", "destinations", "layout_errors", "layouts"],
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
                "regions",
                "skipping",
                "skipping_oracle",
                "stream",
                "stream_errors",
            ],
            &["claimed_ram", "memory", "releasing", "untouched", "zeros"],
        ],
    ),
    (
        "memory-image",
        &[
            &[
                "mapped_chain",
                "sealed",
                "identity",
                "links",
                "verification",
            ],
            &["chains", "damage", "raw_diffs", "restore_targets"],
            &["bad_input", "comparison", "oracle", "secrets"],
            &["chain_memory", "claimed_ram", "diff_chains", "long_chains"],
            &["changed_images", "merged_seals", "pathless", "ram_start"],
            &["checksum_secrets", "events", "guest_targets"],
            &["replaced_images"],
        ],
    ),
    (
        "lazy-restore",
        &[
            &["filling", "memory", "sharing", "split", "start", "waiting"],
            &["changed_images", "claimed_ram", "kvm", "long_chains"],
            &["oracle", "secrets", "signals", "sources", "unprivileged"],
            &["events"],
        ],
    ),
];

/// Returns the names of the crates that are mutated.
pub(crate) fn crates() -> [&'static str; 5] {
    CRATES.map(|(name, _)| name)
}

/// The percentage of mutants that must be caught.
const GOAL: usize = 90;

/// The default shard: all mutants.
const ALL: &str = "0/1";

/// Make small changes to the code, one at a time, and check that the tests detect them
///
/// cargo-mutants makes the changes in a copy of the workspace. Each is tested by the tests of its
/// own crate. .cargo/mutants.toml lists the changes that are not made, each with the reason why no
/// test can detect it. Exit code 0 means that at least 90 % were detected in every crate. The
/// others are listed in target/mutants. All changes take hours: --shard 0/20 makes one twentieth,
/// with some of every file.
#[derive(clap::Args)]
pub(crate) struct Mutants {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only these crates, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "CRATE", value_parser = crates())]
    only: Vec<String>,
    /// The K-th of N parts of the mutants, from 0 on
    #[arg(long, value_name = "K/N", default_value = ALL)]
    shard: String,
    /// The number of mutants that are tested concurrently
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
}

/// The numbers of the mutants of a crate by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcomes {
    caught: usize,
    /// The tests did not end, which counts as caught.
    timeout: usize,
    missed: usize,
    /// The change does not compile.
    unviable: usize,
}

impl AddAssign for Outcomes {
    fn add_assign(&mut self, other: Self) {
        self.caught += other.caught;
        self.timeout += other.timeout;
        self.missed += other.missed;
        self.unviable += other.unviable;
    }
}

impl Outcomes {
    fn tested(self) -> usize {
        self.caught + self.timeout + self.missed
    }

    /// Rounded down.
    fn percent(self) -> usize {
        (self.caught + self.timeout) * 100 / self.tested().max(1)
    }

    fn line(self) -> String {
        format!(
            "{} mutants, {} caught ({} %), {} missed",
            self.tested(),
            self.caught + self.timeout,
            self.percent(),
            self.missed
        )
    }
}

impl Mutants {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let Some(tool) = TOOL.ensure(sh, self.install, "mutants")? else {
            bail!("nothing was tested");
        };
        let (mut all, mut below) = (Outcomes::default(), Vec::new());
        let wanted =
            |name: &&str| self.only.is_empty() || self.only.iter().any(|only| only == name);
        let shard = match self.shard.as_str() {
            ALL => "all".into(),
            shard => format!("part {shard}"),
        };
        for (name, tiers) in CRATES.into_iter().filter(|(name, _)| wanted(name)) {
            let outcomes = self.of(sh, &tool, name, tiers)?;
            self.record.conclude(
                sh,
                &format!("cargo xtask mutants --only {name}"),
                &outcomes.line(),
                &shard,
            )?;
            if outcomes.percent() < GOAL {
                below.push(name);
            }
            all += outcomes;
        }
        ensure!(all.tested() > 0, "no mutant was tested");
        ensure!(
            below.is_empty(),
            "less than {GOAL} % were caught of {}",
            below.join(", ")
        );
        Ok(())
    }

    fn of(&self, sh: &Shell, tool: &Path, name: &str, tiers: Tiers) -> anyhow::Result<Outcomes> {
        let shard = ["--shard", &self.shard, "--sharding", "round-robin"];
        let mut mutants = shard.map(str::to_owned).to_vec();
        let mut targets = vec!["--lib"];
        let mut all = Outcomes::default();
        let mut missed: Option<Vec<String>> = None;
        for files in tiers {
            targets.extend(files.iter().flat_map(|file| ["--test", file]));
            let results = self.pass(sh, tool, name, &mutants, &targets)?;
            let (outcomes, still_missed) = results.of(missed.as_deref());
            let again = std::mem::take(&mut all.missed);
            ensure!(
                again == 0 || again == outcomes.tested() + outcomes.unviable,
                "{again} mutants were missed at first, and {} tried again",
                outcomes.tested()
            );
            all += outcomes;
            if still_missed.is_empty() {
                break;
            }
            mutants = vec!["--re".into(), any_of(&still_missed)];
            missed = Some(still_missed);
            targets.clear();
        }
        Ok(all)
    }

    /// Tests `mutants` with the tests of `targets`. Returns their names by result.
    fn pass(
        &self,
        sh: &Shell,
        tool: &Path,
        name: &str,
        mutants: &[String],
        targets: &[&str],
    ) -> anyhow::Result<Results> {
        let out = sh.current_dir().join("target/mutants").join(name);
        sh.create_dir(&out)?;
        let jobs = self.jobs.to_string();
        // That a case fails is enough: it need not be a small one.
        let _first_failure = sh.push_env("PROPTEST_MAX_SHRINK_ITERS", "0");
        // What is not run is not built either: linking takes longer than most tests, and the
        // documentation's examples longest of all.
        let targets: Vec<_> = targets
            .iter()
            .map(|it| format!("--cargo-arg={it}"))
            .collect();
        // Exit codes other than 0 tell of mutants that were missed, or of what went wrong: the
        // outcomes know better.
        cmd!(
            sh,
            "{tool} mutants --package ramsnap-{name} --jobs {jobs} {mutants...} --output {out} {targets...}"
        )
        .ignore_status()
        .run()?;
        let out = out.join("mutants.out");
        Results::read(sh, &out)
    }
}

/// The names of mutants by result.
#[derive(Debug, Default)]
struct Results {
    caught: Vec<String>,
    timeout: Vec<String>,
    missed: Vec<String>,
    unviable: Vec<String>,
}

impl Results {
    /// Reads the files that cargo-mutants leaves in `out`.
    fn read(sh: &Shell, out: &Path) -> anyhow::Result<Self> {
        let names = |result: &str| {
            let names = sh.read_file(out.join(result).with_extension("txt"));
            let names = names.context("cargo-mutants left no results")?;
            anyhow::Ok(names.lines().map(str::to_owned).collect())
        };
        Ok(Self {
            caught: names("caught")?,
            timeout: names("timeout")?,
            missed: names("missed")?,
            unviable: names("unviable")?,
        })
    }

    /// Returns the numbers for the mutants in `wanted`, and the names of those that no test
    /// detected. `None` selects all mutants. cargo-mutants also tries deleted fields of structs
    /// that its regular expression does not match.
    fn of(&self, wanted: Option<&[String]>) -> (Outcomes, Vec<String>) {
        let is_wanted = |name: &&String| wanted.is_none_or(|wanted| wanted.contains(name));
        let count = |names: &[String]| names.iter().filter(is_wanted).count();
        let outcomes = Outcomes {
            caught: count(&self.caught),
            timeout: count(&self.timeout),
            missed: count(&self.missed),
            unviable: count(&self.unviable),
        };
        let missed = self.missed.iter().filter(is_wanted).cloned().collect();
        (outcomes, missed)
    }
}

/// Returns a regular expression that matches these names and no others.
fn any_of(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| regex::escape(name)).collect();
    format!("^(?:{})$", names.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn timeouts_count_as_caught_and_unviable_mutants_are_ignored() {
        let results = Results {
            caught: names(&["a", "b", "c"]),
            timeout: names(&["d"]),
            missed: names(&["e"]),
            unviable: names(&["f", "g"]),
        };
        let (outcomes, missed) = results.of(None);
        assert_eq!(outcomes.line(), "5 mutants, 4 caught (80 %), 1 missed");
        assert_eq!(missed, ["e"]);
    }

    #[test]
    fn mutants_that_were_not_missed_before_do_not_count_again() {
        let results = Results {
            caught: names(&["a", "not selected"]),
            missed: names(&["b", "not selected either"]),
            ..Results::default()
        };
        let (outcomes, missed) = results.of(Some(&names(&["a", "b"])));
        assert_eq!(outcomes.line(), "2 mutants, 1 caught (50 %), 1 missed");
        assert_eq!(missed, ["b"]);
    }

    #[test]
    fn mutants_with_punctuation_are_selected_by_name() {
        let names = [
            "a.rs:1:2: replace < with > in <A<'_> as B>::c",
            "a.rs:3:4: replace || with &&",
        ];
        let expression = any_of(&names.map(str::to_owned));
        let expression = regex::Regex::new(&expression).expect("an expression");
        for name in names {
            assert!(expression.is_match(name), "{name}");
        }
        assert!(!expression.is_match("a.rs:1:2: replace < with > in <A<'_> as B>::d"));
    }

    #[test]
    fn all_test_files_are_run() {
        let sh = Shell::new().expect("a shell");
        let crates = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates");
        for (name, tiers) in CRATES {
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

    #[test]
    fn no_mutants_are_none_caught() {
        assert_eq!(Outcomes::default().percent(), 0);
    }
}
