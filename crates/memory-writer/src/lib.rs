//! Writes snapshots of a virtual machine's memory: full dumps of the RAM, and diffs of the pages
//! dirtied since.
//!
//! A program that overwrites its last snapshot in place loses both the old and the new one in a
//! crash. A [`MemoryWriter`] stages a file beside its destination, writes guest memory into it at
//! the guest's own offsets, and replaces the destination when it commits. Any failure before the
//! commit leaves the destination unchanged and no file behind.
//!
//! ```
//! use dirty_bitmap::DirtyBitmap;
//! use memory_writer::MemoryWriter;
//!
//! # let dir = tempfile::tempdir()?;
//! # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
//! # let mut ram = vec![0x5a_u8; 1 << 20];
//! let dirty = DirtyBitmap::new(0x4000_0000, 1 << 20, 4096)?; // marked by the backend
//! let mut writer = MemoryWriter::open(&full, 1 << 20, 4096)?;
//! writer.write_full(&ram)?; // any `PageReader`: mapped memory, a file, another process
//! writer.commit()?;
//! # ram[5000] = 1;
//! # dirty.mark(0x4000_0000 + 5000)?;
//!
//! let epoch = dirty.begin_epoch()?; // restores the marks if it is dropped
//! let mut writer = MemoryWriter::open(&diff, 1 << 20, 4096)?;
//! let pages = writer.write_diff(&ram, epoch.bitmap())?;
//! writer.commit_and_release(epoch)?; // discards the marks once the diff is durable
//! # assert_eq!(pages, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # By task
//! **A full snapshot of a running guest** (pre-copy): a later write of a page replaces an earlier
//! one. Write all of the RAM while the guest runs. Then pause the guest, write the pages that it
//! dirtied during the first write, and commit.
//! ```
//! # use dirty_bitmap::DirtyBitmap;
//! # use memory_writer::MemoryWriter;
//! # let dir = tempfile::tempdir()?;
//! # let dest = dir.path().join("live.mem");
//! # let (ram, dirty) = (vec![0_u8; 1 << 20], DirtyBitmap::new(0, 1 << 20, 4096)?);
//! # fn pause() {} fn resume() {}
//! let mut epoch = dirty.begin_epoch()?;
//! let mut writer = MemoryWriter::open(&dest, 1 << 20, 4096)?;
//! writer.write_full(&ram)?; // the guest runs and marks the pages that it writes
//! pause();
//! let dirtied = epoch.extend()?;
//! writer.write_diff(&ram, &dirtied)?;
//! resume();
//! writer.commit_and_release(epoch)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **Marks that are released only once their pages are durable**: a mark that is released too
//! early loses its page without an error. [`commit_and_release`](MemoryWriter::commit_and_release)
//! refuses to commit if a page of the epoch was not written after its mark was taken. For files
//! that are committed as a group, [`check_epoch`](MemoryWriter::check_epoch) makes the same check.
//!
//! **A snapshot with checksums, an id and its parent's id**: [`MemoryWriterOptions::layout`] and
//! [`Seal`]. It also records the guest-physical addresses of the RAM: those of the
//! [reader](page_reader::PageReader::ram_layout), or [`Seal::ram_layout`].
//!
//! **Memory and vCPU state committed together**: store the state in the image with
//! [`MemoryWriter::set_metadata`], or in a file of its own:
//! [`finish`](MemoryWriter::finish) returns the staged file for an [`atomic_file::AtomicGroup`].
//!
//! **A snapshot that is replaced repeatedly**: [`MemoryWriterOptions::recycle`] overwrites the
//! blocks of the snapshot before the last one.
//!
//! **A guest that used little of its RAM**: [`MemoryWriterOptions::skip_untouched`] and
//! [`MemoryWriterOptions::skip_zeros`] make a full dump sparse and fast.
//!
//! **A snapshot that is sent or piped**: [`PackedStream`] writes a packed image to any
//! [`Write`](std::io::Write), without seeking.
//!
//! **A file that has no path** (a memfd, a file of `O_TMPFILE`, an inherited descriptor):
//! [`MemoryWriterOptions::open_file`].
//!
//! **Pages that are listed elsewhere than in a bitmap**: [`MemoryWriter::write_runs`].
//!
//! **Progress and cancellation**, durability, file mode, staging elsewhere:
//! [`MemoryWriterOptions`].
//!
//! **A VMM with a seccomp filter**: [`MemoryWriterOptions::read_untouched`] avoids the system calls
//! that find untouched RAM.
//!
//! # How it works
//! `open` creates the staged file and sets its size. A full dump is one run of bytes. A diff
//! consists of the bitmap's runs, widened to whole pages of the file. [`sparse_file::write_runs`]
//! writes both, directly from guest memory if the reader exposes it. `commit` is that of
//! [`atomic_file`]: sync, rename, sync of the directory.
//!
//! The memory used depends on the amount written, not on the size of the RAM. A raw file, a
//! recycled file, and a dump that skips pages need a bit per page, in blocks of 4096 pages. A
//! sealed or packed image needs memory for its footer: see [`MemoryWriterOptions::layout`].
//!
//! A recycled file contains the bytes of an older snapshot. Pages that were not overwritten are
//! punched out before the commit. A bit per page records which were written.
//!
//! Pages that a full dump skips remain holes in a new file. If the writer has written to the file
//! before, or the file is recycled, the same bit per page records what must be punched out.
//!
//! The bytes of a sealed or packed image are copied once. Checksums are computed from the copy that
//! is written, so they match the file even if the guest writes concurrently. Chunks that are
//! written in more than one pass are read back for their checksums before the commit.
//!
//! # Limitations
//! The default layout is raw: bytes at their guest offsets. In a raw diff, a clean page is a hole.
//! [`write_diff`](MemoryWriter::write_diff) refuses to write a raw diff where holes do not identify
//! the pages:
//!
//! - On every file system but ext4, XFS, btrfs and tmpfs of Linux, and overlayfs over the first
//!   three.
//! - On ext4, ext3 and ext2 if the file gets no extents.
//! - In pages smaller than a block of the file system.
//! - If every page is dirty.
//!
//! Sealed and packed layouts list their pages on every file system.
//!
//! A raw diff does not record its page size: read it in pages of the size that it was written in.
//!
//! # Cargo features
//!
//! - `tracing` (off by default): emits events of the crate [`tracing`](https://docs.rs/tracing), or
//!   records of the crate [`log`](https://docs.rs/log) if the program has no subscriber of
//!   `tracing`. The features of the same name of `atomic-file` and `sparse-file` are
//!   turned on with it: engines, direct I/O, recycling and sweeps are reported. No event contains
//!   bytes of memory.

#[cfg(test)]
mod auto_traits;
mod error;
mod footer_checks;
#[cfg(test)]
mod footer_limit;
mod geometry;
mod options;
mod page_record;
mod progress;
mod raw_diff;
mod reader_source;
mod replaced;
mod seal;
mod sealing;
mod stale_pages;
mod stream;
mod target;
mod trace;
mod write_pass;
mod writer;

// The crates whose types are in public signatures.
pub use atomic_file;
pub use dirty_bitmap;
pub use image_format;
pub use page_reader;
pub use sparse_file;

pub use atomic_file::{
    CommitError, Durability, FileVersion, NotPreserved, OpenError, Preserve, Symlinks,
};
pub use error::{MemoryIoStep, OpenFileError, RamError, SnapshotError, WriteAmbiguity};
pub use image_format::{FooterError, ImageId, Layout, Placement};
pub use options::MemoryWriterOptions;
pub use seal::Seal;
pub use sparse_file::{
    CancelGuard, CancelToken, Engine, EngineChoice, EngineReason, Pass, Progress,
};
pub use stream::{PackedStream, PackedStreamOptions};
pub use writer::{MemoryWriter, PageRun};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
