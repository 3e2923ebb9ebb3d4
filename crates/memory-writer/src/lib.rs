//! Virtual-machine memory snapshots: full dumps of a guest's RAM, and diffs of the pages dirtied since.
//!
//! A [`MemoryWriter`] stages a file beside its destination, writes guest memory into it at the guest's own offsets, and replaces the
//! destination when it commits. Whatever fails before that leaves the destination as it was and nothing behind.
//!
//! # By task
//! **A full snapshot and a diff:**
//! ```
//! use dirty_bitmap::DirtyBitmap;
//! use memory_writer::MemoryWriter;
//!
//! # let dir = tempfile::tempdir()?;
//! # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
//! let mut ram = vec![0x5a_u8; 1 << 20]; // any `PageReader`: mapped guest memory, a file, another process
//! let dirty = DirtyBitmap::new(0x4000_0000, 1 << 20, 4096)?; // marked by the backend, or by hand
//!
//! let mut writer = MemoryWriter::open(&full, 1 << 20, 16384)?;
//! writer.write_full(&ram)?;
//! writer.commit()?;
//!
//! ram[5000] = 1;
//! dirty.set_dirty(0x4000_0000 + 5000)?;
//! let epoch = dirty.begin_epoch()?; // dropped early, it gives the marks back
//! let mut writer = MemoryWriter::open(&diff, 1 << 20, 16384)?;
//! assert_eq!(writer.write_diff(&ram, epoch.bitmap())?, 1);
//! writer.commit_and_release(epoch)?; // durable: only then are the marks forgotten
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **A full snapshot of a running guest** (pre-copy): every write names its offset, so a later one replaces an earlier one. Write
//! all of it while the guest runs, then, with the guest paused, what it dirtied meanwhile; commit.
//! ```
//! # use dirty_bitmap::DirtyBitmap;
//! # use memory_writer::MemoryWriter;
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("live.mem");
//! # let (ram, dirty) = (vec![0_u8; 1 << 20], DirtyBitmap::new(0, 1 << 20, 4096)?);
//! # fn pause() {} fn resume() {}
//! let mut epoch = dirty.begin_epoch()?;
//! let mut writer = MemoryWriter::open(&dest, 1 << 20, 4096)?;
//! writer.write_full(&ram)?; // the guest runs, and marks what it writes
//! pause();
//! let meanwhile = epoch.take_more()?;
//! writer.write_diff(&ram, meanwhile)?;
//! resume();
//! writer.commit_and_release(epoch)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **Marks that are released too early** lose pages without notice. [`commit_and_release`](MemoryWriter::commit_and_release) refuses to
//! commit if any page of the epoch was not written after its mark was taken; [`check_epoch`](MemoryWriter::check_epoch) tells it for files that are
//! committed as a group.
//!
//! **A snapshot that can't be misread**, checksummed, with an id and its parent's: [`Options::layout`] and [`Seal`].
//!
//! **Memory and vCPU state as one**: put the state into the image ([`MemoryWriter::set_metadata`]), or keep it beside: [`finish`](MemoryWriter::finish) gives the staged file to an [`atomic_file::AtomicGroup`].
//!
//! **A snapshot that replaces the one before, again and again**: [`Options::recycle`] overwrites the blocks of the last but one.
//!
//! **A guest that used little of its RAM**: [`Options::skip_untouched`] and [`Options::skip_zeros`] make a full dump of it sparse, and fast.
//!
//! **Progress and cancellation**, durability, file mode, staging elsewhere: [`Options`].
//!
//! **A VMM whose seccomp filter kills**: [`Options::read_untouched`] keeps the calls away that find untouched RAM.
//!
//! # How it works
//! `open` creates the stage and sets its size. A full dump is one run of bytes, a diff the bitmap's runs widened to whole pages of the
//! file; [`sparse_file::write_runs`] writes either, from guest memory directly where the reader hands it out. `commit`
//! is [`atomic_file`]'s: sync, rename, sync of the directory. The memory used does not depend on the RAM's size, but on what is written: a bit
//! per page, in blocks of 4096, of a raw diff and where a file is recycled or pages are skipped, and the footer of a sealed or packed image: see
//! [`Options::layout`].
//!
//! A recycled stage has the bytes of an older snapshot. What of it was not written is punched out before the commit, and a bit per page
//! says what was.
//!
//! What a full dump skips is left as the hole that it is in a new file. If the writer has written to the file before, or it is
//! a recycled one, the same bit per page keeps account of it.
//!
//! A sealed or packed image's bytes are copied once, summed and written from the copy, so a sum is of what is in the file whatever the guest does
//! meanwhile. Chunks that are written in more than one pass are read back for their sum before the commit.
//!
//! # Limitations
//! The default layout is raw: bytes at their guest offsets. In a raw diff, a page that is not there
//! is a hole. Where holes cannot tell the pages, [`write_diff`](MemoryWriter::write_diff) refuses to
//! write a raw diff: on every file system but ext4, XFS, btrfs and tmpfs of Linux, and overlayfs
//! over the first three, in pages smaller than a block of the file system, and if every page is dirty. Sealed and packed layouts say which
//! pages they hold, everywhere.
//!
//! A raw diff does not say how large its pages are: read it in pages of the size that it was written
//! in.

mod error;
mod guest;
mod held;
mod layout;
mod meter;
mod needed;
mod options;
mod page_set;
mod pages;
mod placing;
mod raw_diff;
mod sealing;
mod sink;
mod unwritten;
mod writer;

pub use atomic_file::{
    CommitError, Durability, FileVersion, NotPreserved, OpenError, Preserve, Symlinks,
};
pub use error::{MemoryIoStep, RamError, SnapshotError};
pub use image_format::{FooterError, ImageId};
pub use layout::{Layout, Seal};
pub use options::{CancelToken, Options, Progress};
pub use raw_diff::AmbiguousDiff;
pub use sparse_file::Engine;
pub use writer::MemoryWriter;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
