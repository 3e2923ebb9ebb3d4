//! Guest RAM mapped in this process, with the bitmap of its written pages.
//!
//! A VMM that takes snapshots has to know every page that was written since the last one. The
//! hypervisor reports the guest's writes only: a write of the host, such as a loader or an emulated
//! device, is in no dirty log and causes no write fault. A write that is not marked is missing from
//! the next snapshot, and nothing reports it. [`GuestRam`] marks what the host writes through it.
//!
//! ```
//! use guest_ram::GuestRam;
//! use page_reader::{PageReader, RamLayout};
//!
//! // 1 MiB at 0, and 1 MiB above the MMIO gap.
//! let layout = RamLayout::new([(0, 1 << 20), (4 << 30, 1 << 20)])?;
//! let ram: GuestRam = GuestRam::new(layout)?;
//! ram.write(4 << 30, b"kernel")?; // by guest-physical address
//!
//! let mut copy = [0; 6];
//! ram.read_at(1 << 20, &mut copy)?; // by offset in the memory file
//! assert_eq!(&copy, b"kernel");
//! assert!(ram.dirty_bitmap().is_dirty(1 << 20)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # By task
//! - **Allocate RAM**: [`GuestRam::new`], or [`GuestRam::options`] with an existing bitmap.
//! - **Allocate it in a special way**, for example in a memory file or in huge pages: make a
//!   [`Mapping`] for each region, and pass them to [`map`](GuestRamOptions::map).
//! - **Use memory that another value owns**: a mapped or lazily filled snapshot, or guest memory of
//!   the crate `vm-memory`. [`GuestRam::from_owner`] keeps the [owner](RamOwner), and
//!   `GuestRam::from_guest_memory` takes an `Arc<GuestMemoryMmap>` (feature `vm-memory`).
//! - **Use memory that the VMM has mapped**: [`adopt`](GuestRamOptions::adopt).
//! - **Restore a snapshot into it**: `&GuestRam` is a `RamTarget` of the crate `memory-image`. It
//!   marks no page. [`GuestRam::set_baseline`] makes the restored content the one that the next
//!   diff starts from.
//! - **Register it with a hypervisor**: [`GuestRam::host_address`]. Keep the `GuestRam` until the
//!   hypervisor has confirmed the removal of the memory.
//! - **Save it**: `GuestRam` is a [`PageReader`](page_reader::PageReader) that provides host
//!   addresses, so a writer needs no copy.
//!
//! `kvm-backend` and `hvf-backend` use this crate: they add the allocation and the registration of
//! their hypervisor. [`GuestRam`] has a [`DirtyBitmap`](dirty_bitmap::DirtyBitmap), which suits an
//! emulator that marks each write. [`LoggedRam`] has a bitmap for a hypervisor with a dirty log,
//! such as KVM: its marks are taken only after a harvest of the log. [`TrackedRam`] has a bitmap
//! whose marks only a [`WriteTracker`](dirty_bitmap::WriteTracker) takes.
//!
//! # How it works
//! - No Rust reference covers guest memory. The host stores each aligned machine word with one
//!   relaxed atomic store, and reads in the same way. vCPUs may run concurrently.
//! - A write stores the bytes, *then* marks their pages. A concurrent save copies the new bytes or
//!   leaves the mark to the next save.
//! - Every address is checked against the layout before memory is accessed.
//!
//! # Limitations
//! - A write through a [host address](GuestRam::host_address), by a device or by the kernel, is not
//!   seen here: call [`GuestRam::mark`] after it.
//! - The regions of a layout must consist of whole pages of the host.
//!
//! # Features
//! No feature is enabled by default.
//!
//! - `state-bytes`: `StateFormat`, by which the backends encode the states of vCPUs.
//! - `vm-memory`: `GuestRam::from_guest_memory`, RAM in the guest memory of the `vm-memory` crate.

#[cfg(test)]
mod auto_traits;
mod create;
mod errors;
mod from_owner;
mod mapping;
mod options;
mod owner;
mod ram;
#[cfg(feature = "state-bytes")]
mod state_bytes;

// The crates whose types are in public signatures.
pub use dirty_bitmap;
pub use page_reader;
#[cfg(feature = "vm-memory")]
pub use vm_memory;

pub use errors::{BitmapMismatch, GuestRamError, MisalignedRegion};
pub use mapping::{Mapping, host_page_size};
pub use options::{BaselineKind, BitmapKind, GuestRamOptions};
pub use owner::{OwnerBitmap, RamOwner};
pub use ram::{GuestRam, LoggedRam, TrackedRam};
#[cfg(feature = "state-bytes")]
pub use state_bytes::{StateError, StateFormat};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
