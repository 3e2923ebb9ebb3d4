//! Reads virtual-machine memory snapshots: full images and chains of diffs.
//!
//! A diff holds only the pages that changed, so the RAM of a guest is spread over a full image and
//! all later diffs. A reader that takes a page from the wrong image, or a hole for a page of zeros,
//! restores a guest with wrong memory, and no error reports it. A [`Chain`] reads a full image and
//! its diffs, oldest first, as one image:
//! ```
//! use memory_image::Chain;
//! use page_reader::PageReader;
//! # use dirty_bitmap::DirtyBitmap;
//! # use memory_writer::MemoryWriter;
//! # let dir = tempfile::tempdir()?;
//! # let path = |name: &str| dir.path().join(name);
//! # let (full, diff, merged) = (path("full"), path("diff"), path("merged"));
//! # let mut writer = MemoryWriter::open(&full, 1 << 20, 4096)?;
//! # writer.write_full(&vec![1; 1 << 20])?;
//! # writer.commit()?;
//! # let dirty = DirtyBitmap::new(0, 1 << 20, 4096)?;
//! # dirty.mark(8192)?;
//! # let mut writer = MemoryWriter::open(&diff, 1 << 20, 4096)?;
//! # writer.write_diff(&vec![2; 1 << 20], &dirty)?;
//! # writer.commit()?;
//!
//! let mut chain = Chain::open_raw(&full, 4096)?;
//! chain.push_raw(&diff)?;
//!
//! let mut page = [0; 4096];
//! chain.read_at(8192, &mut page)?; // a chain is a `PageReader`
//! assert!(page == [2; 4096]);
//!
//! chain.flatten(&merged)?; // one full image, staged and committed atomically
//! # assert_eq!(std::fs::read(&merged)?[8191..8193], [1, 2]);
//!
//! let mut ram = vec![0; 1 << 20]; // or a new guest's memory: see `RamTarget`
//! chain.restore(&mut ram)?;
//! # assert_eq!(ram[8191..8193], [1, 2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A chain is checked when it is opened. It can also be mapped, so that a guest starts before all
//! of it was read.
//!
//! # By task
//! **Sealed and packed images** ([`image_format`]) record which pages they hold and which image
//! they are a diff of. [`Chain::open_sealed`] opens all of them at once and refuses a diff that
//! does not follow its predecessor. [`Image::verify`] detects bit rot and truncation.
//! [`Chain::merge`] writes a chain in any layout.
//!
//! **Images that have no path**: [`Image::from_file`] opens a memfd, an unlinked file or an
//! inherited descriptor, and [`Image::from_reader`] any positioned reader, such as bytes in memory.
//! [`Chain::from_image`], [`Chain::push_image`] and [`Chain::push_image_pages`] take them.
//!
//! **Find the pages that changed** between two states: [`compare()`].
//!
//! **Progress and cancellation**: [`Image::verify`], [`compare()`],
//! [`MappedChainOptions::map_with`] and [`Chain::restore_runs`] call a [`ProgressFn`], and
//! [`Chain::merge`] that of its options.
//!
//! **Start a guest at once**, without reading or merging its images. The guest's writes never
//! change the files:
//!
//! - [`MappedImage`] maps a full image copy-on-write. The guest starts after one `mmap`.
//! - [`MappedChain`] maps the longest runs of a chain's images and copies the others. The time
//!   grows with the number of runs: about 10 us each.
//! - The crate `lazy-restore` (Linux, userfaultfd) reads a page of a chain when it is first
//!   touched, and the other pages in the background. The guest starts in less than a millisecond.
//!
//! # Image formats
//! [`Image::open`] opens sealed and packed images only. A truncated or damaged file, or a file of
//! any other kind, is an error. A raw image consists of the guest's bytes alone, so a file is read
//! as a raw image only on request ([`Image::open_raw`]), never because of its content. A guest that
//! writes a footer into its last page changes bytes of its RAM and nothing else.
//!
//! # Pages and gaps of a raw diff
//! A raw diff holds its pages at their guest offsets. Clean pages are holes and read as zeros. A
//! page that the guest zeroed reads as zeros too. Only the file system's holes distinguish the two.
//!
//! [`Chain::push_raw`] uses the holes only where [`sparse_file::PageHoles`] knows that they are
//! reported correctly: on ext4, XFS, btrfs and tmpfs of Linux, and on overlayfs over the first
//! three. In addition, a probe of the diff's directory (after resolving a symbolic link) must show
//! that holes are kept with page granularity and that written zeros are not holes. `push_raw`
//! refuses the diff in all other cases, and where the file was visibly rewritten (it has no hole,
//! or a hole begins inside a page). Applying such a diff would silently put zeros over live memory,
//! or leave stale memory where zeros belong. A caller that has the list of pages passes it to
//! [`Chain::push_pages`].
//!
//! In a raw *full* image, holes only show what need not be read. On other file systems the whole
//! file is read, which gives the same bytes and takes longer.
//!
//! A raw diff does not record its page size. Read it with the page size that it was written with:
//! with larger pages, clean memory beside a page would be read as zeros.
//!
//! Two changes to a raw diff cannot be detected. A tool may punch holes where whole pages are zero
//! (`cp --sparse=always`, `tar -S`): copy raw diffs with tools that keep holes as they are, to file
//! systems that support holes. On tmpfs, touching a hole through a mapping fills the hole: map a
//! raw diff only by [`MappedChain`], which maps no hole of a diff.
//!
//! Sealed and packed images have none of these limitations: their footers list the pages, on every
//! file system and after every copy.
//!
//! # System calls
//! - `MappedChain`: `lseek` (`SEEK_DATA`, `SEEK_HOLE`) on the diffs; `mmap` of anonymous memory,
//!   then `MAP_PRIVATE`, `MAP_FIXED` mappings of files over it, the oldest first; `pread` of the
//!   copied bytes.
//!
//! # Features
//! No feature is enabled by default.
//!
//! - `tracing`: emits events of the crate [`tracing`](https://docs.rs/tracing), or records of the
//!   crate [`log`](https://docs.rs/log) if the program has no subscriber of `tracing`. The features
//!   of the same name of `memory-writer`, `atomic-file` and `sparse-file` are turned on with it.
//!   Opened images, holes that are not trusted, and mappings are reported. No event contains bytes
//!   of memory.
//! - `vm-memory`: `GuestMemoryTarget`, a restore target for the guest memory of the `vm-memory`
//!   crate.
//!
//! # Limitations
//! Reading, mapping and restoring a chain do not verify checksums: [`Chain::verify`] does, and
//! [`Chain::merge`] begins with it.

#[cfg(test)]
mod auto_traits;
mod chain;
mod compare;
mod damage;
mod error;
mod image;
mod image_file;
mod link;
mod map;
mod merge;
mod parallel;
mod raw;
mod restore;
mod trace;
mod verified;
mod verify;

// The crates whose types are in public signatures.
pub use dirty_bitmap;
pub use guest_ram;
pub use image_format;
pub use memory_writer;
pub use page_reader;
pub use sparse_file;
#[cfg(feature = "vm-memory")]
pub use vm_memory;

pub use chain::Chain;
pub use chain::segment::{Segment, SegmentSource};
pub use compare::{CompareError, Difference, compare, find_difference};
pub use damage::{Damage, VerifyReport};
pub use error::{
    ChainError, LinkError, MapError, MergeError, NotFullError, OpenImageError, ReadAmbiguity,
    ReadImageError, RestoreError, VerifyError,
};
pub use image::{Image, ImageOptions};
pub use image_format::{Footer, FooterError, ImageId, Layout, Placement};
pub use map::{MappedChain, MappedChainOptions, MappedImage};
#[cfg(feature = "vm-memory")]
pub use restore::GuestMemoryTarget;
pub use restore::{HostRam, RamTarget, TargetMemory};
pub use sparse_file::{CancelGuard, CancelToken, Pass, Progress, ProgressFn};
pub use verified::VerifiedChain;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
