//! `cargo xtask test`: what a contributor runs before each push.

use std::num::NonZero;
use std::thread::available_parallelism;

use ::file_systems::FileSystem;
use harness::file_systems;
use harness::packages::{Install, Package};
use test_machine::Need;
use xshell::{Shell, cmd};

use super::suite::{Context, Options, Step, Suite, Times, is_installed};

/// What the tests use besides the Rust toolchain,
/// beside the tools of the file systems.
const PACKAGES: &[Package] = &[
    Package::new("strace", "strace"),
    Package::new("llvm", "llvm-mc"),
    Package::new("qemu-system-arm", "qemu-system-aarch64"),
    Package::new("qemu-system-x86", "qemu-system-x86_64"),
    Package::new("qemu-system-common", "qemu-storage-daemon"),
    Package::new("gdb", "gdb"),
    Package::new("python3-drgn", "drgn"),
];

pub(super) const SUITE: Suite = Suite {
    name: "test",
    steps: &[
        Step {
            name: "formatting",
            proves: "all code is formatted by rustfmt",
            paths: &[],
            run: formatting,
        },
        Step {
            name: "prose",
            proves: "texts and names use the project's terms, and text wraps at 100 columns",
            paths: &[],
            run: prose,
        },
        Step {
            name: "lints",
            proves: "clippy has no warning in any crate, test, example or benchmark",
            paths: &[],
            run: lints,
        },
        Step {
            name: "tests",
            proves: "unit and integration tests pass, with the same cases each time",
            paths: &[],
            run: tests,
        },
        Step {
            name: "doc-tests",
            proves: "the examples in the documentation compile and run",
            paths: &[],
            run: doc_tests,
        },
        Step {
            name: "demo",
            proves: "a guest restored from a chain of snapshots, or from a live snapshot, continues correctly",
            paths: &[],
            run: demo,
        },
    ],
};

/// Run the first checks that a change must pass: formatting, lints, tests, one short demo
///
/// As root on Debian or Ubuntu it installs the packages that the tests use. Without root or
/// packages it runs what it can and lists at the end what it did not run, and why. With CI=true in
/// the environment, or RAMSNAP_REQUIRE=all, a test that cannot run fails. Every run does the same
/// work: seeds are fixed.
#[derive(clap::Args)]
pub(crate) struct Test {
    #[command(flatten)]
    options: Options,
}

impl Test {
    /// Runs the steps, and returns the times to record.
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<Times> {
        SUITE.run(sh, &self.options)
    }
}

fn formatting(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    cmd!(sh, "cargo fmt --all --check").run()?;
    cmd!(sh, "cargo fmt --manifest-path fuzz/Cargo.toml --check").run()?;
    Ok(())
}

fn prose(context: &Context<'_>) -> anyhow::Result<()> {
    context.program("source-checks", &["prose"])
}

fn lints(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    let clippy = cmd!(
        sh,
        "cargo clippy --locked --workspace --all-targets --all-features -- --deny warnings"
    );
    Ok(clippy.run()?)
}

fn tests(context: &Context<'_>) -> anyhow::Result<()> {
    install_packages(context.sh, context.install)?;
    run_tests(context.sh)
}

/// Installs the packages that tests use, or prints what is missing.
pub(super) fn install_packages(sh: &Shell, install: Install) -> anyhow::Result<()> {
    let mut packages = file_systems::packages(FileSystem::ALL.into_iter());
    packages.extend(PACKAGES);
    install.ensure(sh, &packages, "the tests")?;
    Ok(())
}

/// Runs all unit and integration tests: by nextest where it is installed, which runs tests of
/// several programs at a time.
pub(super) fn run_tests(sh: &Shell) -> anyhow::Result<()> {
    // The benchmarks build peers and criterion, and are run by `cargo xtask ci`.
    let scope = [
        "--locked",
        "--workspace",
        "--exclude",
        "benches",
        "--all-features",
    ];
    if is_installed(sh, "cargo", &["nextest", "--version"]) {
        // Many tests wait for a disk or for another process.
        let cpus = available_parallelism().map_or(1, NonZero::get);
        let threads = (cpus + cpus.div_ceil(2)).to_string();
        let run = cmd!(sh, "cargo nextest run {scope...} --no-fail-fast");
        return Ok(run.args(["--test-threads", &threads]).run()?);
    }
    println!("cargo-nextest is not installed; it would run the tests faster");
    let test = cmd!(
        sh,
        "cargo test {scope...} --no-fail-fast --lib --bins --tests --examples"
    );
    Ok(test.run()?)
}

fn doc_tests(context: &Context<'_>) -> anyhow::Result<()> {
    let sh = context.sh;
    let test = cmd!(
        sh,
        "cargo test --locked --workspace --exclude benches --all-features --doc"
    );
    Ok(test.run()?)
}

fn demo(context: &Context<'_>) -> anyhow::Result<()> {
    context.xtask("demo --ram 64M --rounds 2").run()?;
    live_demo(context, "64M")
}

/// Runs the demo of live snapshots, where the machine has what it needs.
pub(super) fn live_demo(context: &Context<'_>, ram: &str) -> anyhow::Result<()> {
    let has = |need| context.has(need, "demo --live");
    if has(Need::Kvm)? && has(Need::Userfaultfd)? {
        context.xtask(&format!("demo --live --ram {ram}")).run()?;
    }
    Ok(())
}
