//! Proves that a real Linux in a VMM that knows nothing of this workspace can be snapshot and
//! restored.
//!
//! QEMU emulates a machine whose RAM is a file. The program takes a chain of snapshots of that file
//! with the command-line tool, restores it into a second QEMU, and checks that the guest continues
//! where it was. A damaged page and a missing diff must be detected.
//!
//! Run it by `cargo xtask qemu-e2e`, on Debian for x86-64.

#[cfg(target_os = "linux")]
mod linux;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("error: qemu-e2e runs on Linux only");
    ExitCode::FAILURE
}
