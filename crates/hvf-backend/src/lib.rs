//! Snapshots guests of Apple's Hypervisor framework.
//!
//! A snapshot of a guest needs its RAM, the pages that changed since the last snapshot, and the
//! state of its vCPUs. The framework provides none of these directly. This crate provides guest RAM
//! as a page source, dirty tracking by stage-2 write protection, and vCPU state as data:
//! ```no_run
//! # #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
//! # fn save(
//! #     tracker: &hvf_backend::Stage2Tracker<hvf_backend::Stage2>,
//! #     vcpu: &mut hvf_backend::Vcpu,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use hvf_backend::{ExitAction, VcpuState};
//!
//! loop {
//!     let run_guard = tracker.enter();
//!     let exit = vcpu.run()?;
//!     if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Forward {
//!         break; // a device or a hypercall: no write fault
//!     }
//! }
//! let epoch = tracker.checkpoint()?; // all pages the first time, later those written since
//! let state = VcpuState::capture(vcpu)?;
//! // ... write the state and the pages of `epoch.bitmap()`; an error restores the marks ...
//! epoch.release()?; // everything is durable
//! # let _ = state;
//! # Ok(())
//! # }
//! # fn main() {}
//! ```
//! The items that need the framework exist on macOS on Apple silicon. On other systems, the crate
//! has the tracker, which works with any write protection, the decoding of arm64 exits, and the
//! state of vCPUs as data.
//!
//! # Example
//! A guest with 1 GiB of RAM, from its creation to its restore:
//! ```no_run
//! # #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use dirty_bitmap::Policy;
//! use hvf_backend::{ExitAction, GuestRam, Stage2, VcpuState, Vm};
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
//!     let run_guard = tracker.enter();
//!     let exit = vcpu.run()?;
//!     if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Resume {
//!         continue; // the program counter is unchanged, so the guest repeats the write
//!     }
//!     drop(run_guard);
//!     // ... a device, a hypercall ...
//!     # break;
//! }
//!
//! let epoch = tracker.checkpoint()?; // all pages the first time, later those written since
//! let state = VcpuState::capture(&vcpu)?;
//! // ... write the state and, from `ram`, the pages of `epoch.bitmap()` ...
//! epoch.release()?; // everything is durable; `release_after` commits and releases in one call
//!
//! // In a new machine, after its RAM was written:
//! let restored = state.restore(&vcpu, state.vtimer.resuming_offset())?;
//! # let _ = restored;
//! # Ok(())
//! # }
//! # #[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
//! # fn main() {}
//! ```
//! `examples/snapshot.rs` is a complete VMM in about a hundred lines.
//!
//! # By task
//! - **Give RAM to a guest**, in one region or several: [`GuestRam`] owns the mappings, and
//!   [`Stage2`] maps them into the guest of a [`Vm`]. The host reads and writes through `GuestRam`,
//!   which marks the host's writes as dirty.
//! - **Track the guest's writes**: [`Stage2Tracker`] write-protects the RAM and handles the faults.
//!   At each fault it unprotects a page or a block of 2 MiB, whichever was cheaper so far. Pass
//!   every exit of a vCPU to the tracker first.
//! - **Save**: stop the vCPUs, call [`checkpoint`](Stage2Tracker::checkpoint), write the pages of
//!   the epoch, and release the epoch once the file is durable. `GuestRam` is a
//!   [`PageReader`](page_reader::PageReader) that provides host addresses.
//! - **Save and restore vCPUs**: [`VcpuState`], captured and restored on the thread of the vCPU,
//!   and [`GicState`] for the framework's interrupt controller. Both are serde types.
//! - **Pause several vCPUs**: [`Vm::pause`] makes all of them leave the guest, and waits until each
//!   thread has captured the state of its vCPU and parks.
//! - **Restore several vCPUs**: [`Vm::restore_vcpus`] gives each thread its turn, in the order that
//!   the interrupt controller needs.
//! - **Signal interrupts of devices**: [`Vm::set_spi`] and [`Vm::send_msi`], at the addresses of
//!   [`GicPlace`] and [`MsiRegion`] ([`Vm::gic_sizes`]).
//! - **Keep the machine and vCPUs of a VMM**: [`VmOptions::adopt`] and [`Vm::adopt_vcpu`], or
//!   `adopt_applevisor` for the objects of the crate `applevisor`.
//! - **Start from an image**: [`Stage2::start`] maps it into the guest with the tracker active.
//! - **Move guests between kinds of Macs**: [`CpuFeatures`], which a guest is limited to by
//!   [`VmOptions::cpu_features`].
//! - **Run a program without firmware or kernel**: [`el1`].
//!
//! # Entitlement
//! The framework only serves programs that are signed with the entitlement
//! `com.apple.security.hypervisor`. An ad hoc signature is sufficient. `macos/sign-and-run.sh` of
//! this crate signs programs as a cargo runner:
//! ```toml
//! [target.aarch64-apple-darwin]
//! runner = "path/to/sign-and-run.sh"
//! ```
//!
//! # How it works
//! - **RAM**: anonymous `mmap`, then `hv_vm_map` with read, write and execute permission.
//! - **Protect and unprotect**: `hv_vm_protect` of exactly the range, without and with write
//!   permission, one call at a time.
//! - **Write fault**: the vCPU exits with a data abort and the guest-physical address. The tracker
//!   unprotects the page and marks it, and the VMM calls `hv_vcpu_run` again.
//! - **End**: independent of the order of drops, `hv_vm_unmap` precedes `munmap`, and
//!   `hv_vcpu_destroy` and `hv_vm_unmap` precede `hv_vm_destroy`.
//! - **State**: `hv_vcpu_get_*` and `hv_vcpu_set_*`, where each register is read back after it was
//!   written; `hv_gic_state_*` and `hv_gic_set_state`. A file has the names of system registers.
//!   The state of the interrupt controller has no CPU interface, so those registers are part of
//!   each vCPU's state.
//! - **Order of a restore with an interrupt controller**: `hv_vcpu_create` of all vCPUs in the
//!   captured order, each with its MPIDR_EL1, then `hv_gic_set_state`, then each vCPU's state, then
//!   the first `hv_vcpu_run`.
//! - **Timers**: the virtual counter continues from its captured value. The physical timer compares
//!   with the host's counter (`mach_absolute_time`), so the time until it fires is captured.
//! - **SME** of an M4 or later: first the modes (`hv_vcpu_set_sme_state`), which reset other
//!   registers, then Q0 to Q31, then Z, P, ZA and ZT0, then FPSR. Guests see SME only if the
//!   machine was created with `Vm::options().sme(true)`.
//! - **Address bits**: a new vCPU reports no more in ID_AA64MMFR0_EL1 than its machine has.
//! - **Forks**: guest RAM is not inherited (`minherit`), because a copy-on-write page would be
//!   replaced at the host's next write, and the guest keeps the old one.
//!
//! No Rust reference covers guest memory. It is accessed word by word with atomic operations, or by
//! address by the kernel.
//!
//! Some calls use the declarations of `applevisor-sys` instead of the methods of `applevisor`. That
//! crate passes permissions as the numbers of its enum variants, protects only whole allocations,
//! and reads the reason of an exit as a Rust enum. On stable Rust it declares a vector argument as
//! an integer, which is passed in another register. Its IRQ and FIQ are interchanged. Each number
//! that this crate takes from it is compared at compile time with that of Apple's headers.
//!
//! # Versions of macOS
//! The functions that are newer than macOS 12 are looked up when they are called (`dlsym`). A
//! program that imported them would not start on older systems. Where one is missing, the error
//! [`UnsupportedFunction`] names it and the first macOS that has it. The macOS is that of
//! `API_AVAILABLE` in the headers of `Hypervisor.framework`:
//!
//! | for | functions | since | header |
//! |---|---|---|---|
//! | address bits | `hv_vm_config_*_ipa_size` | 13.0 | `hv_vm_config.h` |
//! | interrupt controller | `hv_gic_*` | 15.0 | `hv_gic.h` and `hv_gic_*.h` |
//! | ACTLR_EL1 | `hv_sys_reg_t` | 15.0 | `hv_vcpu_types.h` |
//! | SME | `hv_vcpu_*_sme_*`, `hv_sme_config_*` | 15.2 | `hv_vcpu.h`, `hv_sme_config.h` |
//! | SMCR_EL1, TPIDR2_EL0, SCXTNUM_* | `hv_sys_reg_t` | 15.2 | `hv_vcpu_types.h` |
//! | pages of 4 KiB | `hv_vm_config_set_ipa_granule` | 26.0 | `hv_vm_config.h` |
//!
//! A register that the system or the CPU does not have is not captured.
//!
//! # Limitations
//! - **The macOS part is compiled for a Mac, but was never run on one.** It runs on Linux over a
//!   fake of the framework. The README lists what the fake does not do. The portable part has been
//!   run: the tracker with real faults of other platforms; the demo's arm64 program, page table and
//!   initial processor state in an emulator.
//! - A process has one virtual machine at a time. This is a limit of the framework.
//! - The VMM saves the state of its devices. It must call
//!   [`GuestRam::mark`](guest_ram::GuestRam::mark) for every write of a device to guest memory.
//! - The state of exception level 2 of a guest with nested virtualization is not captured. Before
//!   macOS 15.2, a guest that has switched SME on is [an error](CaptureError::Sme).
//! - The guest's instruction caches are not invalidated after host writes. After code was replaced
//!   that the guest may have executed, call [`Stage2::invalidate_instructions`].
//!
//! # Features
//! Each feature adds options, which require that version of macOS, and includes the features before
//! it, except for `applevisor`.
//! - `applevisor`: adoption of the machine and vCPUs of the crate `applevisor`.
//! - `macos-13`: guest-physical addresses of more than 36 bits.
//! - `macos-15`: the framework's interrupt controller and its state.
//! - `macos-26`: stage 2 in pages of 4 KiB.

// On other systems, the text above names items that do not exist.
#![cfg_attr(
    not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)),
    allow(rustdoc::broken_intra_doc_links)
)]

// The functions of the framework that the tests call.
#[cfg(all(test, hvf_fake))]
use fake_hvf as _;

#[cfg(test)]
mod auto_traits;
mod cpu_features;
pub mod el1;
mod exit;
mod fault_costs;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
mod macos;
mod ram;
mod register_names;
mod state;
mod syndrome;
mod tracker;

// The crates whose types are in public signatures.
#[cfg(all(
    any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake),
    feature = "applevisor"
))]
pub use applevisor;
pub use dirty_bitmap;
pub use guest_ram;
pub use page_reader;

pub use cpu_features::{CpuFeatures, MissingFeature};
pub use exit::{Exception, Exit};
pub use fault_costs::fault_costs;
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub use macos::{
    AdoptVcpuError, AdoptedVcpu, Canceller, CaptureError, CreateVcpuError, CreateVmError, HvError,
    MapError, PAGE_SIZE, Paused, ProtectError, Register, RestoreError, Restored, Stage2,
    StartError, SysReg, UnsupportedFunction, Vcpu, Vm, VmOptions, has_hypervisor,
};
#[cfg(all(
    any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake),
    feature = "macos-15"
))]
pub use macos::{
    GicError, GicPlace, GicSizes, GicSizesError, MsiRegion, RestoreVcpuError, VcpuTurn,
    VcpuTurnsError,
};
pub use ram::GuestRam;
pub use state::{
    Encoding, GicState, PhysicalTimer, SmeState, StateError, StreamingRegisters, SystemRegister,
    UnknownName, VcpuState, VirtualTimer, ZaRegisters,
};
pub use syndrome::Access;
pub use tracker::{
    ExitAction, RunGuard, Stage2CheckpointError, Stage2FaultError, Stage2Tracker,
    Stage2TrackerError,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
