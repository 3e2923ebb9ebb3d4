//! Tracks which pages of a guest's RAM changed since the last save.
//!
//! A snapshot of only the changed pages is small, but it must not miss one. A [`DirtyBitmap`] has a
//! bit for every page of RAM. vCPU and device threads set bits while the guest runs, without locks.
//! A save takes the marks out as an [`Epoch`], writes the marked pages, and releases the epoch once
//! the file is durable:
//! ```
//! use dirty_bitmap::DirtyBitmap;
//! # fn write_and_sync(offset: u64, len: u64) -> std::io::Result<()> { Ok(()) }
//!
//! let bitmap = DirtyBitmap::new(0x4000_0000, 256 << 20, 4096)?;
//! bitmap.mark_range(0x4000_0ffc, 8)?; // touches two pages
//!
//! let epoch = bitmap.begin_epoch()?; // new marks now belong to the next save
//! for run in epoch.bitmap().runs() {
//!     write_and_sync(run.start, run.end - run.start)?; // on an error, the marks return
//! }
//! epoch.release()?; // durable: discard the marks
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A mark that was set is in the next durable save or is still set. Neither a failed save nor a
//! concurrent change of the page size loses a mark.
//!
//! # By task
//! - **Mark a write**: [`mark`](DirtyBitmap::mark) marks an address,
//!   [`mark_range`](DirtyBitmap::mark_range) a range, [`mark_page`](DirtyBitmap::mark_page) a page
//!   by its index, [`mark_words`](DirtyBitmap::mark_words) the set bits of words, and
//!   [`mark_dirty_log`](DirtyBitmap::mark_dirty_log) the pages in a hypervisor's dirty log. A mark
//!   outside the RAM is an error, because an ignored mark would be a lost page.
//! - **Save the marked pages**: [`begin_epoch`](DirtyBitmap::begin_epoch), as above.
//! - **Change the page size** while the guest runs: [`rebuild`](DirtyBitmap::rebuild). Coarse pages
//!   cause fewer write faults where tracking costs a fault. Fine pages make smaller diffs.
//! - **Track by write faults**, where writes are found by protecting memory: a [`WriteTracker`]
//!   handles the faults and protects the pages again at each checkpoint, through any
//!   [`WriteProtection`]. For each block of 2 MiB, it unprotects single pages or the whole block,
//!   as its [`Policy`] decides. Its bitmap is a [`TrackedBitmap`], whose marks only the tracker can
//!   take.
//! - **Save RAM whose writes a hypervisor logs**, such as KVM: a [`LoggedBitmap`], whose marks a
//!   [`LoggedEpoch`] takes after the log was moved into the bitmap.
//! - **Recover from a save that never ends**: [`reclaim_epoch`](DirtyBitmap::reclaim_epoch).
//!   [`Epoch::release_after`] prevents a save from replacing a later one after its epoch was
//!   reclaimed.
//! - **Check that everything was written** before marks are discarded: [`Coverage`].
//! - **Read the marks**: [`runs`](DirtyBitmap::runs) returns ranges of bytes,
//!   [`pages`](DirtyBitmap::pages) ranges of page indexes, and
//!   [`to_words`](DirtyBitmap::to_words) one bit for each page.
//! - **Copy marks**: [`mark_all`](DirtyBitmap::mark_all) adds the marks of another bitmap, and
//!   [`to_bytes`](DirtyBitmap::to_bytes) encodes them, for another process.
//! - **Combine sets of pages**: [`page_set`](DirtyBitmap::page_set) returns a [`PageSet`], and
//!   [`mark_pages`](DirtyBitmap::mark_pages) takes one.
//! - **Join and widen ranges** of addresses: [`coalesce`], [`whole_pages`], and [`runs_of`] a bit
//!   slice.
//!
//! # How it works
//! There is a table for each page size. It is allocated when it is first needed, and never freed. A
//! published word names the table that marks go to. A marker sets its bit and then reads that word
//! again. If the word changed, the marker also sets the bit in the new table. The rebuilder
//! publishes the new table first and sweeps the old one afterwards. Every bit is set and taken by a
//! read-modify-write, so either the sweep takes the mark or the marker sees the change.
//!
//! A summary word records which of 64 words may have marks. A walk over a mostly clean bitmap of 1
//! TiB in 4 KiB pages therefore reads half a megabyte.
//!
//! The loom models in `tests/loom.rs`, `tests/loom_epochs.rs` and `tests/loom_tracker.rs` check
//! marking against draining, rebuilding, epochs and write faults in every interleaving that loom
//! distinguishes.
//!
//! # Features
//! - `vm-memory` (off by default): `DirtyBitmapSlice`, by which a `GuestMemoryMmap` of the crate
//!   `vm-memory` marks each write, and `DirtyBitmap::mark_guest_memory`, which takes the marks of
//!   its `AtomicBitmap`s. Use them for the writes of devices, which a hypervisor's dirty log lacks.
//!
//! # Limitations
//! A bitmap covers one range of addresses. Where the RAM has gaps, let the bitmap cover the offsets
//! in the memory file. Draining, rebuilding and reading a bitmap exclude each other by a lock.
//! Marking never waits.

#![forbid(unsafe_code)]

mod bitmap;
mod blocks;
mod bytes;
mod coverage;
mod dirty_log;
mod edges;
mod epoch;
mod extension;
mod geometry;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod kind;
mod logged;
mod marking;
mod marks;
mod page_set;
mod page_units;
mod parent;
mod policy;
mod protection;
mod ranges;
mod runs;
mod sync;
mod table;
mod tracker;

/// The crate of the bit slices that [`runs_of`] takes.
pub use bitvec;
/// The crate of the guest memory that [`DirtyBitmap::mark_guest_memory`] takes.
#[cfg(feature = "vm-memory")]
pub use vm_memory;

pub use bitmap::{DirtyBitmap, LoggedBitmap, TakenBitmap, TrackedBitmap};
pub use blocks::BLOCK_SIZE;
pub use bytes::DecodeError;
pub use coverage::{Coverage, FullBegan};
pub use dirty_log::DirtyLogError;
pub use epoch::{
    BeginEpochError, Epoch, EpochCommitting, EpochExtended, EpochReclaimed, ExtendError,
    NotReleased, ReleaseError, TrackedEpoch,
};
pub use extension::Extension;
pub use geometry::{GeometryError, MAX_RAM_SIZE, OutOfRange, RangeMismatch};
#[cfg(feature = "vm-memory")]
pub use guest_memory::{DirtyBitmapSlice, MarkMemoryError, RegionBitmap, SliceError};
pub use kind::{Logged, Markable, Taken, Tracked, Untracked};
pub use logged::LoggedEpoch;
pub use page_set::PageSet;
pub use parent::ParentImage;
pub use policy::{Costs, Policy};
pub use protection::WriteProtection;
pub use ranges::{Coalesce, coalesce, coalesce_within, runs_of, whole_pages};
pub use runs::Runs;
pub use tracker::{CheckpointError, FaultError, TrackerError, WriteTracker};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
