//! Runs the README's two commands on a fresh machine: a minimal Debian with stale package lists.
//!
//! Run it by `cargo xtask fresh`, on Debian, as root.

#[cfg(target_os = "linux")]
mod machine;

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser;

    let fresh = machine::Fresh::parse();
    harness::run(|sh| fresh.run(sh))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("error: fresh-machine runs on Linux only");
    ExitCode::FAILURE
}
