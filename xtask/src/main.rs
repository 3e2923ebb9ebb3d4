//! Every developer task: `cargo xtask TASK`.
//!
//! A task is code of this crate that runs other programs, or a program under `testing/` that this
//! crate has built and becomes. This crate links no crate under `crates/`.

mod bench;
mod dist;
mod fuzz;
mod program;
mod steps;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xshell::Shell;

use program::Arguments;

/// Run the developer tasks: checks, tests, benchmarks and proofs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compare the policies of the write tracker over traces of guest writes
    #[command(disable_help_flag = true)]
    Adaptive(Arguments),
    Bench(bench::Bench),
    /// Lint everything for Apple silicon, and link what uses the hypervisor, also on Linux
    #[command(disable_help_flag = true)]
    CheckMacos(Arguments),
    Ci(steps::Ci),
    /// Check the files that a loss of power at any moment leaves on real file systems
    #[cfg(target_os = "linux")]
    #[command(disable_help_flag = true)]
    Crash(Arguments),
    /// Snapshot a running guest, restore it into a new one, and prove that it continues correctly
    #[command(disable_help_flag = true)]
    Demo(Arguments),
    Dist(dist::Dist),
    /// Run hvf-backend's tests, examples and demo over a fake of Apple's Hypervisor framework
    #[command(disable_help_flag = true)]
    FakeHvf(Arguments),
    /// Make each system call of each scenario fail, in every way in which it can fail
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[command(disable_help_flag = true)]
    Faults(Arguments),
    /// Run the README's two commands on a minimal Debian with stale package lists
    #[cfg(target_os = "linux")]
    #[command(disable_help_flag = true)]
    Fresh(Arguments),
    /// Mount each file system, run the library on it, and report which promises hold
    #[command(disable_help_flag = true)]
    FsMatrix(Arguments),
    Fuzz(fuzz::Fuzz),
    /// Make small changes to the code, one at a time, and check that the tests detect them
    #[command(disable_help_flag = true)]
    Mutants(Arguments),
    Prove(steps::Prove),
    /// Snapshot a Linux guest in QEMU, restore the chain into another QEMU, and prove that it
    /// continues correctly
    #[cfg(target_os = "linux")]
    #[command(disable_help_flag = true)]
    QemuE2e(Arguments),
    /// Run the sessions of the tool in its README and in the guides, and write their output there
    RecordSessions,
    /// Run the tests under sanitizers that detect data races, use after free and out-of-bounds
    /// accesses
    #[cfg(target_os = "linux")]
    #[command(disable_help_flag = true)]
    Sanitize(Arguments),
    /// Save guests repeatedly while faults are injected, and compare everything that was saved
    #[cfg(target_os = "linux")]
    #[command(disable_help_flag = true)]
    Soak(Arguments),
    Test(steps::Test),
}

fn main() -> ExitCode {
    let task = Xtask::parse_from(arguments()).task;
    harness::run(|sh| run(sh, task))
}

/// Returns the command line. `help TASK` becomes `TASK --help`, which a program answers itself.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if let [_, help, _] = arguments.as_slice()
        && help == "help"
    {
        arguments.remove(1);
        arguments.push("--help".into());
    }
    arguments
}

fn run(sh: &Shell, task: Task) -> anyhow::Result<()> {
    match task {
        Task::Adaptive(arguments) => arguments.run("adaptive"),
        Task::Bench(bench) => bench.run(sh),
        Task::CheckMacos(arguments) => arguments.run("check-macos"),
        Task::Ci(ci) => steps::record(sh, &ci.run(sh)?),
        #[cfg(target_os = "linux")]
        Task::Crash(arguments) => arguments.run("crash-states"),
        Task::Demo(arguments) => arguments.run("demo"),
        Task::Dist(dist) => dist.run(sh),
        Task::FakeHvf(arguments) => arguments.run("check-hvf"),
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        Task::Faults(arguments) => arguments.run("syscall-faults"),
        #[cfg(target_os = "linux")]
        Task::Fresh(arguments) => arguments.run("fresh-machine"),
        Task::FsMatrix(arguments) => arguments.run("fs-matrix"),
        Task::Fuzz(fuzz) => fuzz.run(sh),
        Task::Mutants(arguments) => arguments.run("mutants"),
        Task::Prove(prove) => steps::record(sh, &prove.run(sh)?),
        #[cfg(target_os = "linux")]
        Task::QemuE2e(arguments) => arguments.run("qemu-e2e"),
        Task::RecordSessions => record_sessions(sh),
        #[cfg(target_os = "linux")]
        Task::Sanitize(arguments) => arguments.run("sanitizers"),
        #[cfg(target_os = "linux")]
        Task::Soak(arguments) => arguments.run("soak"),
        Task::Test(test) => steps::record(sh, &test.run(sh)?),
    }
}

/// The test that compares the sessions records them.
fn record_sessions(sh: &Shell) -> anyhow::Result<()> {
    let _record = sh.push_env("RAMSNAP_RECORD_SESSIONS", "1");
    xshell::cmd!(sh, "cargo test --locked --package ramsnap --test readme").run()?;
    Ok(())
}
