//! A guest in a virtual machine of Apple's Hypervisor framework: `ledger_aarch64.s` on a vCPU of
//! the framework.
//!
//! The program and the initial state are compiled on every platform, so that an emulator can test
//! them.

#[cfg(any(test, hvf_fake))]
mod assembler;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod machine;
mod program;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod shared_vm;
mod start;
#[cfg(test)]
mod tests;

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub use machine::Machine;

/// Doorbell value, rung with `hvc`: the requested step is reached.
const ARRIVED: u16 = 1;
/// Doorbell value: the ledger is checked.
const CHECKED: u16 = 2;

/// Checks that this host has the framework and permits this program to use it.
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub fn available() -> anyhow::Result<()> {
    shared_vm::available()
}
