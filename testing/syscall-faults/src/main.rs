//! Makes each system call and io_uring completion of a scenario fail, in every way in which it can.
//!
//! The program carries out the scenarios of [`scenarios`], and some more, in a child process that
//! it traces, once for each call and each injected fault. It compares the result of the library
//! with the disk, the dirty bitmap and the open resources of the process. Mutants show that the
//! program detects violations.
//!
//! Run it by `cargo xtask faults`, on Linux on x86-64.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod linux;

use std::process::ExitCode;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> ExitCode {
    linux::main()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() -> ExitCode {
    eprintln!("error: syscall-faults runs on Linux on x86-64 only");
    ExitCode::FAILURE
}
