//! What a file system does with holes and alignment, measured; the extents of a file; runs of memory written at the device's
//! speed.
//!
//! For programs that store large, mostly empty memory (a guest's RAM, a database's pages, a disk image) and want
//! holes where a file system has them and right bytes everywhere.
//!
//! # Ask a file system what it does
//!
//! [`Capabilities::probe`] writes a small unnamed file and looks at what became of it: names of file systems and
//! operating systems decide nothing. It says what happened to that file, and not that holes of any
//! other file are reported correctly: see [below](#use-the-holes-of-a-file).
//!
//! ```
//! use sparse_file::{Capabilities, HoleSupport};
//!
//! let dir = tempfile::tempdir()?;
//! let here = Capabilities::probe(dir.path())?;
//! println!("{here}");
//! if here.holes != HoleSupport::Sparse {
//!     println!("a diff stored here takes as much space as a full dump");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Write the pages that changed
//!
//! [`write_runs`] pulls the bytes of each run from a [`Source`] and writes them at their offsets. A source that can
//! name the [`Memory`] that holds its bytes has it written from there by the kernel, without a copy and without a Rust reference
//! to it, so vCPUs may go on writing it. [`grow`] gives the file its length, trailing clean pages included.
//!
//! ```
//! use sparse_file::{Source, WriteError, WriteOptions, grow, write_runs};
//! use std::{io, ops::ControlFlow};
//!
//! /// A guest of 1 GiB that answers for its memory over some protocol.
//! struct Remote;
//!
//! impl Source for Remote {
//!     fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
//!         buf.fill((offset >> 12) as u8);
//!         Ok(())
//!     }
//! }
//!
//! let file = tempfile::tempfile()?;
//! grow(&file, 1 << 30)?;
//! let runs = [0..16384, 1 << 20..(1 << 20) + 4096];
//! match write_runs(&file, runs, &Remote, &WriteOptions::new(), &mut |_| ControlFlow::Continue(())) {
//!     Ok(bytes) => assert_eq!(bytes, 20480),
//!     Err(WriteError::Source { offset, source }) => panic!("no memory at {offset}: {source}"),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ## Which engine writes
//!
//! [`Engine::Auto`] looks at the job, the file and the machine; each engine can be chosen by hand, and all give the same bytes.
//!
//! | on | taken | what it does |
//! |---|---|---|
//! | Linux, the file takes direct I/O | [`Engine::IoUring`] | up to 64 requests (32 MiB) in flight, straight from the source's memory to the device |
//! | the same, io_uring missing or forbidden (old kernels, `kernel.io_uring_disabled`, seccomp in containers) | [`Engine::Threads`] | 8 threads with direct `pwrite` for ranges of 256 KiB and more, the page cache for the rest |
//! | no direct I/O, jobs up to 1 MiB, no threads to be had | [`Engine::Positioned`] | one `pwrite` after the other, through the page cache |
//! | macOS | [`Engine::Positioned`] | the same, with `F_NOCACHE` for jobs of more than 1 MiB |
//!
//! Direct I/O wants whole aligned blocks. What is not goes another way, range by range and never the whole file: parts of blocks
//! at both ends of a run, and what the file system refuses, through the page cache; memory at an address that doesn't suit,
//! through aligned buffers. A block is never written both ways at once.
//!
//! ```
//! use sparse_file::{Engine, WriteError, WriteOptions, write_runs};
//! use std::ops::ControlFlow;
//!
//! let ram = vec![7; 4 << 20];
//! let file = tempfile::tempfile()?;
//! let ring = WriteOptions::new().engine(Engine::IoUring);
//! match write_runs(&file, [0..4 << 20], ram.as_slice(), &ring, &mut |_| ControlFlow::Continue(())) {
//!     Ok(bytes) => assert_eq!(bytes, 4 << 20),
//!     Err(WriteError::Engine { engine, source }) => println!("{engine:?}: {source}"),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Use the holes of a file
//!
//! File systems report holes where there is data: FUSE for what was written through a mapping, older
//! OpenZFS for what was not written out, APFS inside clones. They report no error. So a hole is used
//! only where the implementation is known, and everything else is data:
//!
//! | purpose | ask | used on | elsewhere |
//! |---|---|---|---|
//! | skip what a guest never touched in a RAM file that it may be writing; skip the zeros of an image | [`extents`], [`extents_in`]; [`check_holes_are_zeros`] says why not | ext4, XFS, btrfs, tmpfs and memfds, on Linux; overlayfs (containers) over the first three | all is data, and is read |
//! | tell the pages of a diff by the holes between them | [`PageHoles`] | the same, in pages of at least a block and 4 KiB, after a sync and a probe of the directory | refused: keep a list of the pages |
//! | report what a file system says, right or wrong | [`reported_extents`] | everywhere | - |
//!
//! Reading a hole instead of skipping it costs the speed of the page cache: some seconds for each 10
//! GiB of a sparse file. It gives the same bytes.
//!
//! # Make room, give it back
//!
//! [`reserve`] takes blocks in advance, [`punch_hole`] frees them, [`share_blocks`] takes another file's (reflink), [`allocated_bytes`] counts them.
//!
//! # What file systems were seen to do
//!
//! A sparse file with a few pages in it, after `fsync`. ext4, XFS, btrfs, tmpfs and exFAT (FUSE) are held to their
//! line by this crate's tests; the others were measured once with Linux 6.1's drivers.
//!
//! | file system | holes | `SEEK_HOLE` | punching | direct I/O |
//! |---|---|---|---|---|
//! | ext4, XFS, btrfs | yes | exact | frees | yes |
//! | tmpfs | yes | exact | frees | accepted, without meaning |
//! | exFAT (FUSE and kernel driver) | **none** | all data | no | yes |
//! | HFS+ | **none** | all data | no | yes |
//! | APFS (linux-apfs-rw 0.3.0) | unknown: `st_blocks` is 0 | all data | no | no |
//! | NFS v3 over ext4 | as the server's | all data | no | yes |
//! | NFS v4.2 over ext4 | as the server's | exact | yes | yes |
//!
//! So on exFAT and HFS+ a diff is stored dense, with the right bytes, and can't be told from its holes: keep a map of what is
//! present beside the bytes. What `SEEK_HOLE` says on NFS v4.2 is exact, and not used: its server
//! decides it.
//!
//! # How it works
//!
//! - Probing: `O_TMPFILE` (or create and unlink), `ftruncate`, some `pwrite`, `fsync`, then `fstat`, `lseek`, `statx`
//!   (`STATX_DIOALIGN`), `fcntl(F_SETFL, O_DIRECT)` with aligned `pwrite` and `pread`, and `fallocate(PUNCH_HOLE)`.
//! - Extents: one `fstat`, one `fstatfs`, one `lseek` an extent; on overlayfs `ioctl(FS_IOC_FIEMAP)`,
//!   `FS_IOC_GETFLAGS` and `statx`, or `fgetxattr`, before the first and after each hole. `ENXIO` from `SEEK_HOLE` is never a
//!   hole, and from `SEEK_DATA` only where `SEEK_HOLE` has just returned that offset.
//! - Writing, positioned: one `getrlimit`, then one `pwrite` a chunk of at most 1 MiB, cut at multiples of 1 MiB; `EINTR`, `EAGAIN`
//!   and short writes are gone on with.
//! - Writing, with requests in flight: `open` of `/proc/self/fd/N` with `O_DIRECT`, `statx(STATX_DIOALIGN)`, then `io_uring_setup`
//!   and one `io_uring_enter` for some requests of at most 1 MiB, or `clone3` and `pwrite`. A request that comes back
//!   short, interrupted or refused is finished by `pwrite` through the page cache.
//! - `RLIMIT_FSIZE` is looked up before the kernel would answer with the deadly signal `SIGXFSZ`, and `EFBIG` given instead.
//!
//! # Limitations
//!
//! - Linux and macOS. The macOS side is type-checked and was never run.
//! - Nothing here syncs for durability, and no file is replaced atomically: that is for the layer above.
//! - A limit lowered by another thread while [`write_runs`] runs is not noticed.
//! - Direct I/O needs a descriptor of its own: a file that is open for appending, may not be opened again for writing, or can't be
//!   reached at `/proc/self/fd` is written through the page cache.
//! - macOS doesn't tell whether a file had `F_NOCACHE`: after [`write_runs`] it has not.
//! - The extents of a file that someone else changes are a hint.
//!
//! There are no cargo features.

mod buffer;
mod extents;
mod holes;
mod identity;
mod limit;
mod memory;
mod probe;
mod space;
mod sys;
mod write;

pub use extents::{Extent, Extents, Kind, Knowledge, extents, extents_in, reported_extents};
pub use holes::{
    HolesUnknown, PageHoles, PagesUnknown, check_holes_are_zeros, file_system_name, is_on_disk,
};
pub use identity::FileIdentity;
pub use memory::Memory;
pub use probe::{
    AlignmentBasis, Capabilities, DirectIo, HoleSupport, ProbeError, Punch, SeekHole, WrittenZeros,
};
pub use space::{SpaceError, allocated_bytes, grow, punch_hole, reserve, share_blocks};
pub use write::{Engine, Source, WriteError, WriteOptions, write_runs};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
