//! The guest in a virtual machine of Apple's Hypervisor framework: `ledger_aarch64.s` on a vCPU of
//! its.
//!
//! What it begins with is compiled everywhere, so that the program can be tested under an emulator.

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod machine;
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod place;
mod program;
mod start;
#[cfg(test)]
mod tests;

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub use machine::Machine;

/// What the guest rings, by `hvc`: it is where it was to work until.
const ARRIVED: u16 = 1;
/// What the guest rings: its ledger is checked.
const CHECKED: u16 = 2;

/// Whether this machine has the framework and this program may use it, or why not.
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub fn available() -> anyhow::Result<()> {
    place::available()
}
