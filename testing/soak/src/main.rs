//! Saves several guests at a time, for the requested time, with injected faults.
//!
//! After each save and each failure the program verifies the images and compares the restored RAM
//! with a copy. Mutants show that the program detects differences.
//!
//! Run it by `cargo xtask soak`, on Linux.

#[cfg(target_os = "linux")]
mod linux;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    linux::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("error: soak runs on Linux only");
    ExitCode::FAILURE
}
