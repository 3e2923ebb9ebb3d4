//! Runs the tests of the crates under ThreadSanitizer and AddressSanitizer.
//!
//! Run it by `cargo xtask sanitize`, on Linux on x86-64.

#[cfg(target_os = "linux")]
mod sanitize;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser;

    let sanitize = sanitize::Sanitize::parse();
    harness::run(|sh| sanitize.run(sh))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("error: sanitizers runs on Linux only");
    ExitCode::FAILURE
}
