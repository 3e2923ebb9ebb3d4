//! Tests the framework, the CPU and the file system of this Mac, and prints a report.
//!
//! Run `cargo run --package ramsnap-hvf-backend --all-features --example selftest` on a Mac with
//! Apple silicon, and paste the report into an issue. `--json` prints JSON instead. A step is a
//! process of its own, so that one that fails, crashes or hangs does not end the others. The exit
//! status is 1 if a step failed.

#[cfg(hvf_fake)]
use fake_hvf as _;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod costs;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod files;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod guest;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod interrupts;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod memory;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod processes;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod report;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod state;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod storm;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
fn main() -> std::process::ExitCode {
    use report::Step;

    /// The groups of steps, in the order of the report.
    const GROUPS: [&[Step]; 6] = [
        &state::STEPS,
        &memory::STEPS,
        &storm::STEPS,
        &interrupts::STEPS,
        &files::STEPS,
        &costs::STEPS,
    ];
    processes::main(&GROUPS.concat())
}

#[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
fn main() {
    eprintln!("this example needs macOS on Apple silicon");
}
