//! Snapshots of KVM guests: guest RAM as a page source, the dirty log, the state of vCPUs.
//!
//! A snapshot of a running guest needs three things from KVM: the pages that the guest wrote since
//! the last snapshot, a moment at which no vCPU writes memory, and the state of the vCPUs at that
//! moment. KVM offers each of them, but in the wrong order they lose pages: KVM completes pending
//! I/O, and writes guest memory, only when a vCPU runs again. The types of this crate permit the
//! right order only:
//! ```no_run
//! # #[cfg(target_os = "linux")]
//! # fn save(
//! #     vcpus: &kvm_backend::Vcpus,
//! #     log: &kvm_backend::DirtyLog,
//! #     commit: impl FnOnce() -> std::io::Result<()>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! // Each vCPU has left the guest, and its thread has called `Vcpu::complete_io`.
//! let paused = vcpus.pause()?; // an error while a vCPU runs or has I/O pending
//! // ... capture the vCPUs with `VcpuState::capture` ...
//! let harvest = log.harvest(paused)?; // moves KVM's dirty log into the bitmap of the RAM
//! let epoch = harvest.begin_epoch()?; // takes the marks
//! // ... copy the pages of `epoch.bitmap()` to a file ...
//! drop(harvest); // the vCPUs may run
//! epoch.release_after(commit)?; // restores the marks if `commit` fails
//! # Ok(())
//! # }
//! # fn main() {}
//! ```
//!
//! # Writes of the host
//! <div class="warning">
//!
//! Your devices' writes are not in KVM's log. KVM logs what the vCPUs write, not what the VMM
//! writes through its own mapping of the memory: emulated devices, loaders, vhost, I/O into guest
//! memory. A page that only they wrote is missing from the next diff, and nothing reports it,
//! unless it is marked in the bitmap of the RAM. The same holds for a page that the VMM discards
//! (a balloon, free page reporting): it reads as zeros, and a restore has its old bytes.
//!
//! </div>
//!
//! How to mark the pages depends on what the VMM writes through:
//!
//! - [`GuestRam::write`](guest_ram::GuestRam::write) marks them itself.
//! - `GuestMemoryMmap<DirtyBitmapSlice>` of the crate `vm-memory` marks them itself.
//! - `GuestMemoryMmap<AtomicBitmap>` of that crate needs a call of `DirtyBitmap::mark_guest_memory`
//!   before each epoch. Each harvest makes it if the log is started with
//!   [`DirtyLogOptions::mark_host_writes`]. For such memory [`DirtyLog::start`] is an error.
//! - After a write by a host address, by the kernel or by another process, and after each discard,
//!   call [`GuestRam::mark`](guest_ram::GuestRam::mark).
//!
//! The types for `vm-memory` are in the crate `dirty-bitmap`, with its feature `vm-memory`.
//!
//! How a VMM discards a page depends on the mapping. `madvise(MADV_DONTNEED)` makes zeros in
//! private anonymous memory only. In shared memory, which
//! [`GuestRam::new`](guest_ram::GuestRam::new) and a memory file are, the old bytes stay and
//! nothing is freed: use `MADV_REMOVE`, or punch a hole in the file (`fallocate`).
//!
//! # Example
//! A guest that writes a page, saved and restored in a new virtual machine:
//! ```
//! # #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use kvm_backend::{
//!     DirtyLog, GuestRam, MsrList, RamSlots, VcpuState, Vcpus, create_vm, long_mode, open_kvm,
//! };
//! use kvm_ioctls::VcpuExit;
//! use page_reader::{PageReader, RamLayout};
//!
//! # if !test_machine::Need::Kvm.met("the example of the crate") { return Ok(()); }
//! let kvm = open_kvm()?;
//! let msrs = MsrList::query(&kvm)?; // `kvm` is not needed for a capture
//! let layout = RamLayout::single(0, 2 << 20)?;
//! let new_vm = || -> Result<_, Box<dyn std::error::Error>> {
//!     let vm = create_vm(&kvm)?;
//!     let ram = Arc::new(GuestRam::new(layout.clone())?);
//!     let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
//!     let vcpus = Vcpus::new(&vm)?;
//!     Ok((vm, ram, slots, vcpus))
//! };
//!
//! // inc byte ptr [rsp]; mov al, [rsp]; out 0x80, al; jmp back
//! let program = [0xfe, 0x04, 0x24, 0x8a, 0x04, 0x24, 0xe6, 0x80, 0xeb, 0xf6];
//! let (vm, ram, slots, vcpus) = new_vm()?;
//! let mut vcpu = vcpus.create(&vm, 0)?;
//! ram.write(0x8000, &program)?;
//! let start = long_mode::Start { entry: 0x8000, stack: 0x10_0000, page_tables: 0x1000 };
//! long_mode::boot(&kvm, &ram, &vcpu, &start)?;
//!
//! let log = DirtyLog::start(&slots)?; // marks all of the RAM
//! ram.set_baseline()?; // as after a restore: only later writes are marked
//! assert!(matches!(vcpu.run()?, VcpuExit::IoOut(0x80, [1])));
//!
//! vcpu.complete_io(|_| ())?;
//! let paused = vcpus.pause()?;
//! let state = VcpuState::capture(&msrs, &paused, &vcpu)?;
//! let harvest = log.harvest(paused)?;
//! assert!(ram.dirty_bitmap().is_dirty(0x10_0000)?);
//! let mut image = vec![0; layout.ram_size() as usize]; // or write a file with memory-writer
//! ram.read_at(0, &mut image)?;
//! drop(harvest); // the vCPUs may run again
//!
//! let (vm, ram, _slots, vcpus) = new_vm()?;
//! let mut vcpu = vcpus.create(&vm, 0)?;
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
//! # By task
//! **Give a guest RAM** of one or several regions, each a memory slot: [`GuestRam`] owns the
//! mappings, [`RamSlots`] registers them. The host reads and writes through `GuestRam`, which marks
//! what the host writes. A VMM that has its own mappings and slots keeps them:
//! [`GuestRamOptions::own`] and [`GuestRamOptions::adopt`], [`RamSlots::adopt`].
//!
//! **Find the pages that the guest wrote**: [`DirtyLog`] moves KVM's log into the RAM's
//! [`LoggedBitmap`](dirty_bitmap::LoggedBitmap). The page size of the bitmap is free. The guest may
//! run.
//!
//! **Save a guest**, in this order. The types enforce it up to the epoch
//! ([`Vcpus`](Vcpus#order-at-a-pause)), which only a harvest begins:
//!
//! 1. make the vCPUs leave the guest, and complete their I/O ([`Vcpu::complete_io`]);
//! 2. pause them ([`Vcpus::pause`]);
//! 3. capture their state ([`VcpuState::capture`]);
//! 4. harvest the log ([`DirtyLog::harvest`]);
//! 5. begin an epoch ([`PausedHarvest::begin_epoch`]), and write its pages (`GuestRam` is a
//!    [`PageReader`](page_reader::PageReader) that provides host addresses);
//! 6. release the epoch once the file is durable.
//!
//! **Save a running guest**, most of which is copied before it pauses: [`Precopy`] makes these
//! steps in this order (example `precopy`).
//!
//! **Save and restore vCPUs**: [`VcpuState`]. [`VmState`] has the interrupt controllers, the timer
//! and the clock. Both have `to_bytes` and `from_bytes`, and are serde types.
//!
//! **Without `/dev/kvm`**: a sandboxed process captures with a [`MsrList`] that was queried before.
//!
//! **Add snapshots to a VMM** with guest memory of the crate `vm-memory` and slots of its own: the
//! example `own_vmm` of this crate.
//!
//! **Run a program without firmware or kernel**: [`long_mode::boot`].
//!
//! # Platforms
//! Linux only; on other systems this crate is empty. RAM and the dirty log work on x86-64, arm64
//! and RISC-V, the state of vCPUs on x86-64. The user must be permitted to open `/dev/kvm`: the
//! error of [`open_kvm`] states what is missing.
//!
//! # How it works
//! - **RAM**: `mmap` of address space, then of the RAM in it (`MAP_SHARED`, `MAP_NORESERVE`), each
//!   host address congruent to its guest address modulo 2 MiB. The memory is anonymous or a sealed
//!   `memfd_create`.
//! - **Slots**: `KVM_SET_USER_MEMORY_REGION`, and again with size 0 before the RAM is unmapped.
//! - **Dirty log**: `KVM_MEM_LOG_DIRTY_PAGES` and `KVM_GET_DIRTY_LOG`; where KVM offers it,
//!   `KVM_CLEAR_DIRTY_LOG` after the pages are marked.
//! - **vCPU**: `KVM_GET_*` and `KVM_SET_*` of MP_STATE, REGS, SREGS, XSAVE(2), XCRS, DEBUGREGS,
//!   LAPIC, MSRS, CPUID2, TSC_KHZ, NESTED_STATE and VCPU_EVENTS.
//! - **Virtual machine**: `KVM_GET_*` and `KVM_SET_*` of IRQCHIP, PIT2 and CLOCK.
//!
//! No Rust reference ever covers guest memory. It is accessed word by word with atomic operations,
//! or by the kernel by address.
//!
//! # Limitations
//! - The VMM saves the devices that it emulates itself, and marks what they write to guest memory:
//!   see [above](#writes-of-the-host).
//! - Not captured: the page-directory pointers of 32-bit PAE guests (KVM reads them from RAM
//!   again), machine-check banks, Xen and SEV state, and the time that passed while the guest was
//!   saved.
//! - Dirty rings, read-only slots and `guest_memfd` are not used. The log of a virtual machine
//!   whose dirty ring was enabled is incomplete: on x86-64 KVM refuses to read it, on arm64 it
//!   lacks the writes of the vCPUs.

#![cfg(all(
    target_os = "linux",
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64"
    )
))]
// On the other two, some links above have no targets.
#![cfg_attr(not(target_arch = "x86_64"), allow(rustdoc::broken_intra_doc_links))]

#[cfg(test)]
mod auto_traits;
mod linux;

// The crates whose types are in public signatures.
pub use dirty_bitmap;
pub use guest_ram;
pub use kvm_bindings;
pub use kvm_ioctls;
pub use page_reader;

pub use linux::{
    dirty_log::{
        DirtyLog, DirtyLogOptions, HarvestError, HarvestStats, LogEpochError, PausedHarvest,
        Reprotect, StartError,
    },
    open::{OpenKvmError, create_vm, open_kvm, open_kvm_at},
    precopy::{Precopied, Precopy, PrecopyError},
    ram::{GuestRam, GuestRamOptions},
    slots::{RamSlots, SlotError},
    vcpus::{PauseError, Paused, Vcpu, Vcpus},
};

#[cfg(target_arch = "x86_64")]
pub use linux::x86_64::{
    bytes::StateError,
    capture::CaptureError,
    long_mode,
    msrs::MsrList,
    restore::{RestoreError, Restored},
    vcpu_state::{Msr, VcpuState},
    vm_state::{IrqChip, VmState, VmStateError},
};

/// Runs the example of the README as a test.
#[cfg(all(doctest, target_arch = "x86_64"))]
#[doc = include_str!("../README.md")]
struct Readme;
