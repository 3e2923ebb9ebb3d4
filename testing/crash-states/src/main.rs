//! Checks the files that a loss of power at any moment leaves on real file systems.
//!
//! The program carries out the scenarios of [`scenarios`] on mounted file systems while every write
//! and flush of their disks is logged. From each log it makes the disks that a loss of power may
//! leave, mounts them, and looks for files that were lost or torn. Mutants, which are commits that
//! lack a step, show that the program detects such files.
//!
//! Run it by `cargo xtask crash`, as root on Linux.

#[cfg(target_os = "linux")]
mod linux;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("error: crash-states runs on Linux only");
    ExitCode::FAILURE
}
