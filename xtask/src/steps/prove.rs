//! `cargo xtask prove`: everything exhaustive, random or long.

use xshell::{Shell, cmd};

use super::suite::{Context, Options, Step, Suite, Times};
use super::{busy, changed, test};

pub(super) const SUITE: Suite = Suite {
    name: "prove",
    steps: &[
        Step {
            name: "tests",
            proves: "all tests pass with many more rounds, new random cases, and races that must occur",
            paths: &["crates", "testing", "xtask"],
            run: tests,
        },
        Step {
            name: "packages",
            proves: "each crate builds from its archive, with each set of its features, and with the oldest dependencies that its manifest accepts",
            paths: &["crates", "testing/source-checks"],
            run: check_packages,
        },
        Step {
            name: "interleavings",
            proves: "no mark is lost in any interleaving that loom distinguishes, and no vCPU runs during a pause; 27 mutants are detected",
            paths: &[
                "crates/dirty-bitmap",
                "crates/hvf-backend",
                "crates/kvm-backend",
                "crates/live-snapshot",
                "testing/mutants",
            ],
            run: interleavings,
        },
        Step {
            name: "macos",
            proves: "as in ci; and tests are linted for Apple silicon too, and the tool, the programs of xtask, and the examples with all features link for macOS 11",
            paths: &["crates", "testing", "testing/check-macos"],
            run: macos,
        },
        Step {
            name: "fake-hvf",
            proves: "as in ci, and with the fewest features of hvf-backend",
            paths: &[
                "crates/hvf-backend",
                "crates/live-snapshot",
                "testing/check-hvf",
                "testing/fake-hvf",
            ],
            run: fake_hvf,
        },
        Step {
            name: "syndromes",
            proves: "an emulated processor reports guest accesses to protected pages as recorded, and write permission resolves those that the decoder must recognize",
            paths: &["crates/hvf-backend", "testing/syndromes"],
            run: syndromes,
        },
        Step {
            name: "demo",
            proves: "the demo passes with RAM on both sides of the MMIO gap",
            paths: &["crates", "testing/demo", "testing/guests"],
            run: demo,
        },
        Step {
            name: "crash",
            proves: "no state that a power loss can leave has lost or torn anything; commits without a sync are detected",
            paths: &[
                "crates/atomic-file",
                "crates/host-memory",
                "crates/image-format",
                "crates/memory-image",
                "crates/memory-writer",
                "crates/sparse-file",
                "testing/crash-states",
                "testing/random",
                "testing/scenarios",
            ],
            run: crash,
        },
        Step {
            name: "faults",
            proves: "every fault of every system call and completion is reported truthfully and leaves nothing behind",
            paths: &[
                "crates/atomic-file",
                "crates/dirty-bitmap",
                "crates/host-memory",
                "crates/image-format",
                "crates/lazy-restore",
                "crates/memory-image",
                "crates/memory-writer",
                "crates/sparse-file",
                "crates/uffd",
                "testing/page-client",
                "testing/random",
                "testing/scenarios",
                "testing/syscall-faults",
            ],
            run: faults,
        },
        Step {
            name: "soak",
            proves: "an hour of saves, a third of them with a fault, loses and tears nothing and leaks nothing",
            paths: &[
                "crates/atomic-file",
                "crates/dirty-bitmap",
                "crates/guest-ram",
                "crates/host-memory",
                "crates/image-format",
                "crates/kvm-backend",
                "crates/lazy-restore",
                "crates/live-snapshot",
                "crates/memory-image",
                "crates/memory-writer",
                "crates/page-reader",
                "crates/sparse-file",
                "crates/uffd",
                "testing/guests",
                "testing/page-client",
                "testing/random",
                "testing/soak",
                "testing/write-faults",
            ],
            run: soak,
        },
        Step {
            name: "fs-matrix",
            proves: "the library's promises hold on ten file systems, with power cuts where there is a disk",
            paths: &[
                "crates/atomic-file",
                "crates/host-memory",
                "crates/image-format",
                "crates/memory-image",
                "crates/memory-writer",
                "crates/sparse-file",
                "testing/fs-matrix",
                "testing/linux-guest",
                "testing/random",
                "testing/scenarios",
            ],
            run: fs_matrix,
        },
        Step {
            name: "fuzzing",
            proves: "footers, chains, dirty logs, bitmaps, RAM layouts and states of vCPUs from libFuzzer are read or refused",
            paths: &[
                "crates/dirty-bitmap",
                "crates/host-memory",
                "crates/image-format",
                "crates/memory-image",
                "crates/page-reader",
                "fuzz",
                "xtask/src/fuzz.rs",
            ],
            run: fuzzing,
        },
        Step {
            name: "sanitize",
            proves: "ThreadSanitizer and AddressSanitizer report nothing, and find mutants",
            paths: &["crates", "testing/sanitizers"],
            run: sanitize,
        },
        Step {
            name: "mutants",
            proves: "the tests detect small changes to the six crates that could lose a page, and to hvf-backend's code for macOS",
            paths: &[
                "crates/atomic-file",
                "crates/dirty-bitmap",
                "crates/hvf-backend",
                "crates/lazy-restore",
                "crates/live-snapshot",
                "crates/memory-image",
                "crates/memory-writer",
                "testing/fake-hvf",
                "testing/mutants",
            ],
            run: mutants,
        },
        Step {
            name: "load",
            proves: "`test` and `ci` pass three times in a row beside a busy loop on each core",
            paths: &["crates", "testing", "xtask", "fuzz", "benches", ".config"],
            run: load,
        },
        Step {
            name: "fresh",
            proves: "the README's two commands pass on a minimal Debian with stale package lists",
            paths: &[
                "testing/demo",
                "testing/fresh-machine",
                "testing/harness",
                "testing/source-checks",
                "xtask",
                "README.md",
            ],
            run: fresh,
        },
    ],
};

/// Run the exhaustive, random and long checks: all crash states, all faults, an hour of soak,
/// mutants, sanitizers
///
/// All steps together take many hours: name some, or select them with --changed. Before each step,
/// the duration of its last run is printed. Random steps print their seed.
#[derive(clap::Args)]
pub(crate) struct Prove {
    #[command(flatten)]
    options: Options,
    /// Only the steps that test files changed since REV, including uncommitted changes [default:
    /// the upstream branch, or the commit before the last if there is none]
    #[arg(long, value_name = "REV", num_args = 0..=1, conflicts_with = "steps")]
    changed: Option<Option<String>>,
}

impl Prove {
    /// Runs the steps, and returns the times to record.
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<Times> {
        let Some(rev) = &self.changed else {
            return SUITE.run(sh, &self.options);
        };
        let selection = changed::select(sh, SUITE.steps, rev.as_deref())?;
        let names: Vec<_> = selection.steps.iter().map(|step| step.name).collect();
        if names.is_empty() {
            println!(
                "no step is affected by the changes since {}",
                selection.since
            );
            return Ok(SUITE.no_times());
        }
        println!("changed since {}: {}", selection.since, names.join(", "));
        if self.options.list {
            return Ok(SUITE.no_times());
        }
        SUITE.run_steps(sh, &self.options, &selection.steps, selection.crates)
    }
}

impl Context<'_> {
    /// Runs `cargo xtask ARGUMENTS`, which puts its closing line into docs/reliability.md where
    /// that is asked for.
    fn recorded(&self, arguments: &str) -> anyhow::Result<()> {
        let record = if self.record { " --record" } else { "" };
        Ok(self.xtask(&format!("{arguments}{record}")).run()?)
    }

    /// Runs the task, limited to the changed crates where the steps are chosen by what changed.
    fn recorded_for_changed(&self, task: &str) -> anyhow::Result<()> {
        match self.crates.as_slice() {
            [] => self.recorded(task),
            crates => self.recorded(&format!("{task} --changed {}", crates.join(","))),
        }
    }
}

fn tests(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    test::install_packages(sh, context.install)?;
    let seed = cmd!(sh, "od -An -N4 -tu4 /dev/urandom").quiet().read()?;
    println!("PROPTEST_RNG_SEED={seed}");
    let _seed = sh.push_env("PROPTEST_RNG_SEED", seed.trim());
    let _cases = sh.push_env("PROPTEST_CASES", "2048");
    let _thorough = sh.push_env(test_machine::THOROUGH, "1");
    test::run_tests(sh)
}

fn check_packages(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("source-checks", &["package-builds"])
}

fn interleavings(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("interleavings", &[])
}

fn macos(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("check-macos").run()?)
}

fn fake_hvf(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("fake-hvf").run()?)
}

fn syndromes(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("syndromes", &[])
}

fn demo(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("demo --ram 4G --rounds 2").run()?)
}

fn crash(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded("crash")
}

fn faults(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded("faults")
}

fn soak(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded("soak --minutes 60")
}

fn fs_matrix(context: &Context<'_>) -> anyhow::Result<()> {
    let page = if context.record {
        " --markdown docs/fs-matrix.md"
    } else {
        ""
    };
    Ok(context.xtask(&format!("fs-matrix --cuts 20{page}")).run()?)
}

fn fuzzing(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded("fuzz --seconds 600")
}

#[cfg(not(target_os = "linux"))]
fn sanitize(context: &Context<'_>) -> anyhow::Result<()> {
    context.leave_out("sanitize", "it runs on Linux only")
}

#[cfg(target_os = "linux")]
fn sanitize(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded_for_changed("sanitize")
}

fn mutants(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded_for_changed("mutants")
}

fn load(context: &Context<'_>) -> anyhow::Result<()> {
    busy::run(context)
}

#[cfg(not(target_os = "linux"))]
fn fresh(context: &Context<'_>) -> anyhow::Result<()> {
    context.leave_out("fresh", "it runs on Linux only")
}

#[cfg(target_os = "linux")]
fn fresh(context: &Context<'_>) -> anyhow::Result<()> {
    context.recorded("fresh")
}
