//! Every developer task, one door: `cargo xtask TASK`.

#![allow(
    unreachable_pub,
    reason = "nothing in a binary is reachable from outside: pub is for its other modules"
)]

mod adaptive;
mod bench;
mod cargo_tool;
mod chart;
mod check_macos;
#[cfg(target_os = "linux")]
mod crash;
mod debian_rust;
mod demo;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod faults;
#[cfg(target_os = "linux")]
mod fresh;
mod fs_matrix;
mod fuzz;
mod interleavings;
#[cfg(target_os = "linux")]
mod linux_guest;
mod mutants;
mod python;
#[cfg(target_os = "linux")]
mod qemu_e2e;
mod ram;
#[cfg(target_os = "linux")]
mod sanitize;
#[cfg(target_os = "linux")]
mod soak;
mod steps;
#[cfg(target_os = "linux")]
mod write_log;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xshell::Shell;

/// Every developer task, one door.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Adaptive(adaptive::Adaptive),
    Bench(bench::Bench),
    CheckMacos(check_macos::CheckMacos),
    Ci(steps::Ci),
    #[cfg(target_os = "linux")]
    Crash(crash::Crash),
    Demo(demo::Demo),
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    Faults(faults::Faults),
    FsMatrix(fs_matrix::FsMatrix),
    Fuzz(fuzz::Fuzz),
    Mutants(mutants::Mutants),
    Prove(steps::Prove),
    #[cfg(target_os = "linux")]
    QemuE2e(qemu_e2e::QemuE2e),
    #[cfg(target_os = "linux")]
    Sanitize(sanitize::Sanitize),
    #[cfg(target_os = "linux")]
    Soak(soak::Soak),
    Test(steps::Test),
}

fn main() -> ExitCode {
    let task = Xtask::parse().task;
    harness::run(|sh| run(sh, task))
}

fn run(sh: &Shell, task: Task) -> anyhow::Result<()> {
    match task {
        Task::Adaptive(adaptive) => adaptive.run(sh),
        Task::Bench(bench) => bench.run(sh),
        Task::CheckMacos(check) => check.run(sh),
        Task::Ci(ci) => ci.run(sh),
        #[cfg(target_os = "linux")]
        Task::Crash(crash) => crash.run(sh),
        Task::Demo(demo) => demo.run(sh),
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        Task::Faults(faults) => faults.run(sh),
        Task::FsMatrix(matrix) => matrix.run(sh),
        Task::Fuzz(fuzz) => fuzz.run(sh),
        Task::Mutants(mutants) => mutants.run(sh),
        Task::Prove(prove) => prove.run(sh),
        #[cfg(target_os = "linux")]
        Task::QemuE2e(e2e) => e2e.run(sh),
        #[cfg(target_os = "linux")]
        Task::Sanitize(sanitize) => sanitize.run(sh),
        #[cfg(target_os = "linux")]
        Task::Soak(soak) => soak.run(sh),
        Task::Test(test) => test.run(sh),
    }
}
