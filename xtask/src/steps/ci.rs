//! `cargo xtask ci`: what else must hold before a change lands, in minutes and the same each time.

use harness::debian_rust::OLDEST_RUST;
use test_machine::Need;
use xshell::{Shell, cmd};

use super::cargo_deny::CARGO_DENY;
use super::suite::{Context, Options, Step, Suite, Times, is_installed};
use super::test::live_demo;

pub(super) const SUITE: Suite = Suite {
    name: "ci",
    steps: &[
        Step {
            name: "documentation",
            proves: "rustdoc has no warning, and no link in the documentation is broken",
            paths: &[],
            run: documentation,
        },
        Step {
            name: "dependencies",
            proves: "licenses, sources and versions of all dependencies are as deny.toml allows",
            paths: &[],
            run: dependencies,
        },
        Step {
            name: "oldest-rust",
            proves: "everything, tests included, builds with the oldest compiler that the tests support",
            paths: &[],
            run: oldest_compiler,
        },
        Step {
            name: "crates-alone",
            proves: "each crate builds by itself, with no feature that another crate turns on",
            paths: &[],
            run: crates_alone,
        },
        Step {
            name: "packages",
            proves: "each crate's archive has its README and both licenses, its manifest is complete, and no dependency needs a newer compiler than `rust-version`",
            paths: &[],
            run: check_packages,
        },
        Step {
            name: "macos",
            proves: "all libraries and programs are linted for Apple silicon, and hvf-backend's examples link into valid Mach-O executables",
            paths: &[],
            run: macos,
        },
        Step {
            name: "fake-hvf",
            proves: "hvf-backend's code for macOS passes its tests, examples and demo over a fake of Apple's framework, and at least 90 % of its lines are executed",
            paths: &[],
            run: fake_hvf,
        },
        Step {
            name: "interleavings",
            proves: "no mark is lost in any interleaving with at most two preemptions",
            paths: &[],
            run: interleavings,
        },
        Step {
            name: "fuzzing",
            proves: "every input of the corpus, and a fixed number of new ones, is read or refused",
            paths: &[],
            run: fuzzing,
        },
        Step {
            name: "benchmarks",
            proves: "each benchmark runs once, untimed",
            paths: &[],
            run: benchmarks,
        },
        Step {
            name: "demos",
            proves: "the demo passes with every guest of this machine",
            paths: &[],
            run: demos,
        },
        Step {
            name: "qemu",
            proves: "a Linux guest in QEMU resumes from a chain; a damaged page and a missing diff are detected",
            paths: &[],
            run: qemu,
        },
        Step {
            name: "fs-matrix",
            proves: "the library's promises hold on ten file systems, without power cuts",
            paths: &[],
            run: fs_matrix,
        },
        Step {
            name: "crash",
            proves: "a fixed selection of states after a power loss has lost or torn nothing",
            paths: &[],
            run: crash,
        },
        Step {
            name: "faults",
            proves: "a fixed selection of injected faults has lost, torn, leaked or misreported nothing",
            paths: &[],
            run: faults,
        },
        Step {
            name: "soak",
            proves: "a fixed sequence of saves, faults and restores has lost or torn nothing",
            paths: &[],
            run: soak,
        },
    ],
};

/// Run the other checks that a change must pass: macOS, loom, fuzzing, file systems, crashes,
/// faults
///
/// `.ci/run` runs `cargo xtask test` and then this. Every run does the same work: seeds and amounts
/// are fixed, and no result depends on timing. Exhaustive, random and long checks are in `cargo
/// xtask prove`. Without root or packages, it runs what it can and lists the rest. With CI=true, a
/// check that cannot run is an error.
#[derive(clap::Args)]
pub(crate) struct Ci {
    #[command(flatten)]
    options: Options,
}

impl Ci {
    /// Runs the steps, and returns the times to record.
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<Times> {
        SUITE.run(sh, &self.options)
    }
}

fn documentation(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    let _strict = sh.push_env("RUSTDOCFLAGS", "-D warnings");
    let doc = cmd!(
        sh,
        "cargo doc --locked --workspace --all-features --no-deps"
    );
    Ok(doc.run()?)
}

fn dependencies(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    match CARGO_DENY.ensure(sh, context.install, "the dependencies")? {
        Some(deny) => Ok(cmd!(sh, "{deny} check licenses bans sources").run()?),
        None => context.leave_out("dependencies", "cargo-deny is not installed"),
    }
}

fn oldest_compiler(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    let oldest = OLDEST_RUST;
    let this = cmd!(sh, "rustc --version").quiet().read()?;
    if this.starts_with(&format!("rustc {oldest}.")) {
        println!("{this} is the oldest compiler, {oldest}: all other steps use it");
        return Ok(());
    }
    let toolchain = format!("{oldest}.0");
    if !is_installed(sh, "rustup", &["run", &toolchain, "rustc", "--version"]) {
        let why =
            format!("rustup has no toolchain {toolchain}: rustup toolchain install {toolchain}");
        return context.leave_out("oldest-rust", &why);
    }
    let _dir = sh.push_env("CARGO_TARGET_DIR", "target/oldest");
    let check = cmd!(
        sh,
        "rustup run {toolchain} cargo check --locked --workspace --all-targets --all-features"
    );
    Ok(check.run()?)
}

fn crates_alone(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    for dir in sh.read_dir("crates")? {
        let manifest = dir.join("Cargo.toml");
        let check = cmd!(
            sh,
            "cargo check --locked --manifest-path {manifest} --no-default-features"
        );
        check.run()?;
    }
    Ok(())
}

fn check_packages(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("source-checks", &["packages"])
}

fn macos(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("check-macos --quick").run()?)
}

fn fake_hvf(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("fake-hvf --quick").run()?)
}

fn interleavings(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("interleavings", &["--bounded"])
}

fn fuzzing(context: &Context<'_>) -> anyhow::Result<()> {
    if cfg!(not(all(target_os = "linux", target_arch = "x86_64"))) {
        return context.leave_out("fuzzing", "it runs on Linux on x86-64 only");
    }
    Ok(context
        .xtask("fuzz --quick-build --runs 5000 --seed 1")
        .run()?)
}

/// Built with the features that the tests are built with, and not optimized once more: nothing is
/// timed.
fn benchmarks(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    let test = cmd!(
        sh,
        "cargo test --locked --workspace --all-features --bench bitmap --bench ratios --bench write -- --test"
    );
    Ok(test.run()?)
}

fn demos(context: &Context<'_>) -> anyhow::Result<()> {
    context.xtask("demo").run()?;
    if context.has(Need::Userfaultfd, "demo --guest userfaultfd")? {
        context
            .xtask("demo --guest userfaultfd --ram 64M --rounds 2")
            .run()?;
    }
    context
        .xtask("demo --guest mprotect --ram 64M --rounds 2")
        .run()?;
    live_demo(context, "256M")
}

fn qemu(context: &Context<'_>) -> anyhow::Result<()> {
    if context.has(Need::LinuxGuest, "qemu")? {
        context.xtask("qemu-e2e").run()?;
    }
    Ok(())
}

fn fs_matrix(context: &Context<'_>) -> anyhow::Result<()> {
    if context.has(Need::Root, "fs-matrix")? {
        context.xtask("fs-matrix --cuts 0 --quick").run()?;
    }
    Ok(())
}

fn crash(context: &Context<'_>) -> anyhow::Result<()> {
    if context.has(Need::LoggedDisk, "crash")? {
        context.xtask("crash --seed 1 --states 8").run()?;
    }
    Ok(())
}

fn faults(context: &Context<'_>) -> anyhow::Result<()> {
    if context.has(Need::Ptrace, "faults")? {
        context
            .xtask("faults --seed 1 --sample 16 --repeatable")
            .run()?;
    }
    Ok(())
}

fn soak(context: &Context<'_>) -> anyhow::Result<()> {
    Ok(context.xtask("soak --seed 1 --rounds 12").run()?)
}
