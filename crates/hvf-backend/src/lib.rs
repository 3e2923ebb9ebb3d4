//! Snapshot guests of Apple's Hypervisor framework: guest RAM as a page source, dirty tracking by stage-2 write protection, vCPU state.
//!
//! **What takes the framework is for macOS on Apple silicon.** Everywhere else the crate has the tracker, which works with whatever protects
//! memory, what it knows of arm64 exits, and the state of vCPUs as data.
//!
//! # By task
//! **Give a guest RAM**, of one region or several: [`GuestRam`] owns the mappings, [`Stage2`] gives them to the guest of a [`Vm`]. The host reads and
//! writes through `GuestRam`, and what it writes is marked dirty.
//!
//! **Know what the guest wrote**: [`Stage2Tracker`] write-protects the RAM, answers the faults, and opens a page or a block of 2 MiB at each, whichever has
//! paid. Every exit of a vCPU goes to it first.
//!
//! **Save**: stop the vCPUs, [`arm`](Stage2Tracker::arm), write the pages of the epoch (`GuestRam` is a
//! [`PageReader`](page_reader::PageReader) that hands out host addresses), release the epoch once the file is durable.
//!
//! **Save and restore vCPUs**: [`VcpuState`], captured and restored on the vCPU's thread; [`GicState`] for the framework's interrupt
//! controller. Both are serde types.
//!
//! **Run a program without firmware or kernel**: [`el1`].
//!
//! # Example
//! ```no_run
//! # #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use dirty_bitmap::Policy;
//! use hvf_backend::{Answer, GuestRam, Stage2, VcpuState, Vm};
//! use page_reader::RamLayout;
//!
//! let vm = Vm::new()?;
//! let layout = RamLayout::single(0x8000_0000, 1 << 30)?;
//! let ram = Arc::new(GuestRam::new(layout)?);
//! let stage2 = Stage2::map(&vm, &ram)?;
//! let tracker = stage2.track(Policy::default())?;
//!
//! let mut vcpu = vm.create_vcpu()?;
//! // ... load the guest with `ram.write`, set its registers ...
//! loop {
//!     let in_guest = tracker.enter();
//!     let exit = vcpu.run()?;
//!     if tracker.handle_exit(&in_guest, &exit)? == Answer::Handled {
//!         continue; // the program counter stays: the write is tried again
//!     }
//!     drop(in_guest);
//!     // ... a device, a hypercall ...
//!     # break;
//! }
//!
//! let epoch = tracker.arm()?; // all of it the first time, what was written since later
//! let state = VcpuState::capture(&vcpu)?;
//! // ... write the pages of `epoch.bitmap()` from `ram`, and the state; an error on the way gives the marks back ...
//! epoch.release()?; // all of it is durable; `release_after` commits and releases in one
//!
//! // In a new machine, with its RAM written:
//! let restored = state.restore(&vcpu, state.vtimer.resuming_offset())?;
//! # let _ = restored;
//! # Ok(())
//! # }
//! # #[cfg(not(all(target_os = "macos", target_arch = "aarch64")))]
//! # fn main() {}
//! ```
//! `examples/snapshot.rs` is a whole monitor of a page.
//!
//! # Entitlement
//! The framework serves programs that are signed with `com.apple.security.hypervisor`; an ad hoc signature is enough. `macos/sign-and-run.sh` of this
//! crate does it as a cargo runner:
//! ```toml
//! [target.aarch64-apple-darwin]
//! runner = "path/to/sign-and-run.sh"
//! ```
//!
//! # How it works
//! | step | calls |
//! |---|---|
//! | RAM | `mmap`, anonymous; `hv_vm_map` with read, write and execute |
//! | protect, lift | `hv_vm_protect` of just the range, without and with write, one call at a time |
//! | fault | the vCPU leaves with a data abort and the guest-physical address; lift, mark, `hv_vcpu_run` |
//! | end | `hv_vcpu_destroy`, `hv_vm_unmap`, `hv_vm_destroy`, `munmap`, in this order whatever is dropped first |
//! | state | `hv_vcpu_get_*` and `hv_vcpu_set_*`, each register read back after it was written; `hv_gic_state_*`, `hv_gic_set_state` |
//!
//! No Rust reference ever covers guest memory: it is accessed word by word with atomic operations, or by address by the kernel.
//!
//! Some calls are not made through `applevisor` but by its declarations of the framework's functions: it passes permissions as the numbers of its
//! variants, protects only whole allocations, reads the reason of an exit as a Rust enum, and, on stable Rust, declares a vector argument as an
//! integer, which arrives in another register.
//!
//! # Limitations
//! - **The part for macOS is compiled for a Mac, and was never run on one.** What is portable has been run: the tracker with real faults of
//!   other platforms, the demo's arm64 program, page table and first processor state in an emulator.
//! - One virtual machine for each process: the framework's rule.
//! - Devices are the monitor's to save, and every path by which one writes guest memory is the monitor's to mark: [`GuestRam::mark`].
//! - Not captured: SME (a guest that has switched it on is [an error](CaptureError::Sme)), exception level 2 of a guest with nested virtualization,
//!   registers that only macOS 15.2 gives (SCXTNUM, TPIDR2).
//! - The host's writes of instructions are not made visible to the guest's instruction caches: code is loaded before it first runs there.
//!
//! # Features
//! Each asks for that macOS when the program starts, and adds to what is there.
//! - `macos-13`: more than 36 bits of guest-physical addresses.
//! - `macos-15`: the framework's interrupt controller and its state, the memory model of translated x86 programs.
//! - `macos-26`: stage 2 in pages of 4 KiB.

// Elsewhere the text above names what isn't there.
#![cfg_attr(
    not(all(target_os = "macos", target_arch = "aarch64")),
    allow(rustdoc::broken_intra_doc_links)
)]

pub mod el1;
mod exit;
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod macos;
mod state;
mod syndrome;
mod tracker;

pub use exit::{Exception, Exit};
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub use macos::*;
pub use state::{Encoding, GicState, SystemRegister, VcpuState, VirtualTimer};
pub use syndrome::Access;
pub use tracker::{Answer, ArmError, FaultError, InGuest, Stage2Tracker, TrackError};

/// The README's example, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
