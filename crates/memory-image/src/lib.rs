//! The read side of virtual-machine memory snapshots.
//!
//! # By task
//! **Put a chain together** (a full image and the diffs taken after it, oldest first) and read it as one:
//! ```
//! use memory_image::Chain;
//! use page_reader::PageReader;
//! # use dirty_bitmap::DirtyBitmap;
//! # use memory_writer::MemoryWriter;
//! # let dir = tempfile::tempdir()?;
//! # let (full, diff, merged) = (dir.path().join("full"), dir.path().join("diff"), dir.path().join("merged"));
//! # let mut writer = MemoryWriter::open(&full, 1 << 20, 4096)?;
//! # writer.write_full(&vec![1; 1 << 20])?;
//! # writer.commit()?;
//! # let dirty = DirtyBitmap::new(0, 1 << 20, 4096)?;
//! # dirty.set_dirty(8192)?;
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
//! chain.restore(ram.as_mut_slice())?;
//! # assert_eq!(ram[8191..8193], [1, 2]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! **Sealed and packed images** ([`image_format`]) say themselves which pages they hold, and whose diffs they are: [`Chain::open_sealed`] takes them all at
//! once and refuses what doesn't follow, [`Image::verify`] finds bit rot and truncation, [`Chain::merge`] writes a chain in any layout.
//!
//! **Find out what changed** between two states: [`compare`].
//!
//! **Start a guest at once**, without reading or merging what it starts from. What it writes stays its own:
//!
//! | from | | how long until it runs |
//! |---|---|---|
//! | a full image | [`MappedImage`] maps it copy-on-write | one `mmap` |
//! | a chain | [`MappedChain`] maps the longest runs of its images, and copies the others | grows with the runs: about 10 us each |
//! | a chain, on Linux | `LazyRam` reads pages as they are touched (userfaultfd), the rest meanwhile; first what a `WorkingSet` says | below a millisecond |
//!
//! A VMM with private anonymous mappings of its own has them filled by `LazyRamOptions::adopt`. Shared memory
//! is refused there: others that have it would find zeros in missing pages. Restore a chain into it at once
//! ([`Chain::restore`]), before others use it. `examples/lazy_restore.rs` starts guests in all ways.
//!
//! # What a file is
//! [`Image::open`] opens sealed and packed images, and nothing else: a file that was cut off, is damaged, or is anything else, is an error. A raw image is
//! only the guest's bytes, so a file is read as one where the caller says so ([`Image::open_raw`]), and never because of what it holds: a guest that
//! writes a footer into its last page changes bytes of its RAM, and nothing else.
//!
//! # How pages are told from gaps
//! A raw diff holds its pages at their offsets and nothing between: what was clean is a hole, and reads as zeros. A page of the guest that was
//! zeroed reads as zeros too. Only the file system's holes tell the two apart, so [`Chain::push_raw`] uses them only
//! where [`sparse_file::PageHoles`] knows that they are reported correctly: on ext4, XFS, btrfs and
//! tmpfs of Linux, and on overlayfs over the first three, where probing the directory that the diff is in (a symbolic link followed) shows
//! that holes are kept down to the page, and that written zeros are no holes. Otherwise,
//! and where the file was visibly rewritten since (no hole is left, or one begins inside a page), it refuses: applying such a diff would
//! silently put zeros over live memory, or leave stale memory where zeros belong. Whoever kept the list of pages can give it to [`Chain::push_pages`].
//!
//! Of a raw *full* image, holes only say what need not be read. On any other file system all of it is
//! read, which gives the same bytes and takes longer.
//!
//! A raw diff does not say how large its pages are. Read it in pages of the size that it was written
//! in: larger ones would take clean memory beside a page for zeros.
//!
//! What can't be seen in a raw diff: a tool that digs holes where whole pages are zero (`cp --sparse=always`, `tar -S`). Copy raw diffs with tools that keep holes as
//! they are, and on file systems that have them. Nor a hole of a file on tmpfs that was touched through a mapping, which fills it: do not map a raw
//! diff by other means than [`MappedChain`], which maps no hole of a diff.
//!
//! Sealed and packed images have none of these doubts: their footers say it, on every file system and after every copy.
//!
//! # How guests start, as system calls
//! | | |
//! |---|---|
//! | `MappedChain` | `lseek` (`SEEK_DATA`, `SEEK_HOLE`) of the diffs; `mmap` of anonymous memory, then `MAP_PRIVATE`, `MAP_FIXED` of files over it, the oldest first; `pread` of what is copied |
//! | `LazyRam` | `userfaultfd`, or `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`; `MADV_DONTFORK`, `UFFDIO_REGISTER` and `MADV_DONTNEED` of anonymous memory; for each fault `pread` and `UFFDIO_COPY`, or `UFFDIO_ZEROPAGE`, or `UFFDIO_POISON` (Linux 6.6); at the end `UFFDIO_UNREGISTER`, `UFFDIO_WAKE` and `MADV_DOFORK` |
//!
//! # Limitations
//! Reading a chain doesn't check what its bytes sum to: [`Image::verify`] does.

mod chain;
mod compare;
mod error;
mod image;
mod image_file;
mod link;
mod map;
mod merge;
mod page_set;
mod raw;
mod restore;
mod verify;
#[cfg(target_os = "linux")]
mod working_set;

pub use chain::Chain;
pub use compare::{CompareError, compare};
pub use error::{ImageError, Link, Unclear};
pub use image::{Format, Image};
pub use image_format::{Footer, FooterError, ImageId};
pub use map::{MappedChain, MappedChainOptions, MappedImage};
#[cfg(target_os = "linux")]
pub use restore::lazy::{LazyRam, LazyRamOptions, Progress, UserfaultfdError};
pub use restore::{HostRam, RamTarget};
pub use verify::{Damage, Verified};
#[cfg(target_os = "linux")]
pub use working_set::{WorkingSet, WorkingSetError};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
