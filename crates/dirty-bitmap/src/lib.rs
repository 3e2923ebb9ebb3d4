//! Which pages of a guest changed.
//!
//! A [`DirtyBitmap`] has a bit for every page of a guest's RAM. vCPU and device threads set bits, lock-free, while the
//! guest runs; a save takes them out, writes those pages and forgets the marks once the file is durable. A mark, once set, is
//! in the next durable save or still set: not lost to a save that fails, and not to a change of page size under way.
//!
//! # By task
//! **Mark** what was written: [`set_dirty`](DirtyBitmap::set_dirty) an address, [`set_range`](DirtyBitmap::set_range),
//! [`set_dirty_by_index`](DirtyBitmap::set_dirty_by_index), or a hypervisor's [dirty log](DirtyBitmap::mark_log). A mark
//! outside the RAM is an error: ignored, it would be a lost page.
//!
//! **Save** what is marked:
//! ```
//! use dirty_bitmap::DirtyBitmap;
//! # fn write_and_sync(offset: u64, len: u64) -> std::io::Result<()> { Ok(()) }
//!
//! let bitmap = DirtyBitmap::new(0x4000_0000, 256 << 20, 4096)?;
//! bitmap.set_range(0x4000_0ffc, 8)?; // touches two pages
//!
//! let epoch = bitmap.begin_epoch()?; // from here on, new marks belong to the next save
//! for run in epoch.bitmap().runs() {
//!     write_and_sync(run.start, run.end - run.start)?; // an error here gives the marks back
//! }
//! epoch.release()?; // durable: forget them
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **Change the page size** while the guest runs: [`rebuild`](DirtyBitmap::rebuild), finer or coarser. Coarse pages mean few write faults where
//! tracking costs a fault, fine ones mean small diffs.
//!
//! **Track by write faults**, where writes are noticed by protecting memory: a [`WriteTracker`] answers faults and protects again at
//! checkpoints, over any [`WriteProtection`]; for each 2 MiB it opens pages or the whole block, by a [`Policy`]. Its bitmap is a
//! [`TrackedBitmap`], whose marks nothing else can take.
//!
//! **Recover from a save that never ends**: [`reclaim_epoch`](DirtyBitmap::reclaim_epoch). [`Epoch::release_after`] keeps
//! the save whose marks were reclaimed from replacing what was saved since.
//!
//! **Know that all was written** before marks are forgotten: [`Coverage`].
//!
//! **Calculate** with sets of pages: [`page_set`](DirtyBitmap::page_set) gives a `bitvec`, [`mark_bits`](DirtyBitmap::mark_bits) takes one.
//!
//! # How it works
//! A table per page size, made when first needed and never freed; a published word says which table marks go to. A marker sets
//! its bit, then looks at that word again, and sets the bit in the new table too if it changed. The rebuilder publishes
//! first, then sweeps the old table. Every bit is set and taken by a read-modify-write, so either the sweep takes the mark
//! or the marker sees the change. A summary word says which of 64 words have marks, so that a walk over a mostly clean terabyte
//! reads half a megabyte. `tests/loom.rs` and
//! `tests/loom_tracker.rs` check marking against draining, rebuilding, epochs and write faults in every interleaving that loom can tell apart.
//!
//! # Limitations
//! One range of addresses: where RAM has holes, let the bitmap cover offsets in the memory file. Draining, rebuilding and
//! looking at a bitmap exclude each other by a lock; marking never waits.

#![forbid(unsafe_code)]

mod bitmap;
mod blocks;
mod coverage;
mod dirty_log;
mod edges;
mod epoch;
mod geometry;
mod kind;
mod marks;
mod page_set;
mod policy;
mod protection;
mod runs;
mod sync;
mod table;
mod tracker;

pub use bitmap::{DirtyBitmap, TakenBitmap, TrackedBitmap};
pub use blocks::BLOCK_SIZE;
pub use coverage::{Coverage, FullBegan};
pub use dirty_log::DirtyLogError;
pub use epoch::{
    BeginEpochError, Epoch, EpochCommitting, EpochReclaimed, ReleaseError, TakeMoreError,
    TrackedEpoch,
};
pub use geometry::{DifferentRam, GeometryError, MAX_RAM_SIZE, OutOfRange};
pub use kind::{Markable, Taken, Tracked, Untracked};
pub use page_set::{PageSet, PageSetError};
pub use policy::{Costs, Policy};
pub use protection::WriteProtection;
pub use runs::Runs;
pub use tracker::{ArmError, FaultError, TrackerError, WriteTracker};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
