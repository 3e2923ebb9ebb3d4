//! Snapshot KVM guests: guest RAM as a page source, the dirty log, vCPU state.
//!
//! **Linux only; on other systems this crate is empty.** RAM and dirty log work on x86-64, arm64 and RISC-V, the state of vCPUs
//! on x86-64. `/dev/kvm` must open: [`open_kvm`] says what is missing where it doesn't.
//!
//! # By task
//! **Give a guest RAM**, of one region or several, each a memory slot:
//! [`GuestRam`] owns the mappings, [`RamSlots`] registers them. The host reads and writes through `GuestRam`, and what it writes is marked dirty.
//! A monitor with mappings and slots of its own keeps them: [`GuestRamOptions::adopt`], [`RamSlots::adopt`].
//!
//! **Know what the guest wrote**: [`DirtyLog`] moves KVM's log into the RAM's [`DirtyBitmap`](dirty_bitmap::DirtyBitmap), whatever
//! the bitmap's page size, with the guest running or paused.
//!
//! **Save**: make the vCPUs leave the guest, complete their I/O ([`Vcpu::complete_io`]), pause them ([`Vcpus::pause`]), capture
//! their state, harvest, take an epoch of the bitmap, write its pages (`GuestRam` is a
//! [`PageReader`](page_reader::PageReader) that hands out host addresses), release the epoch once the file is durable. The order matters,
//! and the types keep it: see [`Vcpus`](Vcpus#order-at-a-pause).
//!
//! **Save and restore vCPUs**: [`VcpuState`]; [`VmState`] for interrupt controllers, timer and clock. Both are serde types.
//!
//! **Run a program without firmware or kernel**: [`long_mode::boot`].
//!
//! # Example
//! A guest that writes a page, saved and restored in a new virtual machine:
//! ```
//! # #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use kvm_backend::{DirtyLog, GuestRam, RamSlots, VcpuState, Vcpus, create_vm, long_mode, open_kvm};
//! use kvm_ioctls::VcpuExit;
//! use page_reader::{PageReader, RamLayout};
//!
//! # if !test_machine::Need::Kvm.met("the example of the crate") { return Ok(()); }
//! let kvm = open_kvm()?;
//! let layout = RamLayout::single(0, 2 << 20)?;
//! let new_vm = || -> Result<_, Box<dyn std::error::Error>> {
//!     let vm = Arc::new(create_vm(&kvm)?);
//!     let ram = Arc::new(GuestRam::new(layout.clone())?);
//!     let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
//!     let vcpus = Vcpus::new(&vm);
//!     Ok((vm, ram, slots, vcpus))
//! };
//!
//! // inc byte ptr [rsp]; mov al, [rsp]; out 0x80, al; jmp back
//! let program = [0xfe, 0x04, 0x24, 0x8a, 0x04, 0x24, 0xe6, 0x80, 0xeb, 0xf6];
//! let (_vm, ram, slots, vcpus) = new_vm()?;
//! let mut vcpu = vcpus.create(0)?;
//! ram.write(0x8000, &program)?;
//! let start = long_mode::Start { entry: 0x8000, stack: 0x10_0000, page_tables: 0x1000 };
//! long_mode::boot(&kvm, &ram, &vcpu, &start)?;
//!
//! let log = DirtyLog::start(&slots)?; // all of the RAM is marked
//! ram.dirty_bitmap().begin_epoch()?.release()?; // a full snapshot goes between the two
//! assert!(matches!(vcpu.run()?, VcpuExit::IoOut(0x80, [1])));
//!
//! vcpu.complete_io(|_| ())?;
//! let paused = vcpus.pause()?;
//! let state = VcpuState::capture(&kvm, &paused, &vcpu)?;
//! let harvest = log.harvest(paused)?;
//! assert!(ram.dirty_bitmap().is_dirty(0x10_0000)?);
//! let mut image = vec![0; layout.ram_size() as usize]; // memory-writer writes files
//! ram.read_at(0, &mut image)?;
//! drop(harvest); // the guest may go on
//!
//! let (vm, ram, _slots, vcpus) = new_vm()?;
//! let mut vcpu = vcpus.create(0)?;
//! ram.write_at(0, &image)?;
//! let restored = state.restore(&vm, &vcpu)?;
//! # let _ = restored;
//! assert!(matches!(vcpu.run()?, VcpuExit::IoOut(0x80, [2])));
//! # Ok(())
//! # }
//! # #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
//! # fn main() {}
//! ```
//!
//! # How it works
//! | step | system calls |
//! |---|---|
//! | RAM | `mmap` of address space, then `MAP_SHARED`, `MAP_NORESERVE` of the RAM in it, congruent to its guest address modulo 2 MiB; or of a sealed `memfd_create` |
//! | slots | `KVM_SET_USER_MEMORY_REGION`; with size 0 before the RAM is unmapped |
//! | dirty log | `KVM_MEM_LOG_DIRTY_PAGES`; `KVM_GET_DIRTY_LOG`, and where offered `KVM_CLEAR_DIRTY_LOG` after the pages are marked |
//! | vCPU | `KVM_GET_*` and `KVM_SET_*`: MP_STATE, REGS, SREGS, XSAVE(2), XCRS, DEBUGREGS, LAPIC, MSRS, CPUID2, TSC_KHZ, NESTED_STATE, VCPU_EVENTS |
//! | machine | `KVM_GET_*` and `KVM_SET_*`: IRQCHIP, PIT2, CLOCK |
//!
//! No Rust reference ever covers guest memory: it is accessed word by word with atomic operations, or by address by the kernel.
//!
//! # Limitations
//! - Devices other than KVM's own are the monitor's to save, and every path by which one writes guest memory is the monitor's to mark:
//!   [`GuestRam::mark`].
//! - Not captured: the page-directory pointers of 32-bit PAE guests (KVM reads them anew from RAM), machine-check banks, Xen and SEV state,
//!   the wall clock's progress while the guest is saved.
//! - Dirty rings, read-only slots and `guest_memfd` are not used. A machine whose dirty ring was enabled has no complete log: on x86-64 KVM
//!   refuses to read it, on arm64 it lacks what vCPUs write.

// Elsewhere the text above names what isn't there.
#![cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    allow(rustdoc::broken_intra_doc_links)
)]

#[cfg(all(
    target_os = "linux",
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]
mod linux;

#[cfg(all(
    target_os = "linux",
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]
pub use linux::*;

/// The README's example, as a test.
#[cfg(all(doctest, target_os = "linux", target_arch = "x86_64"))]
#[doc = include_str!("../README.md")]
struct Readme;
