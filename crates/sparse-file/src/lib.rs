//! Writes sparse files and finds their holes: a file system's capabilities are measured, and only
//! reliable holes are used.
//!
//! Programs that store large, mostly empty memory (a guest's RAM, a database's pages, a disk image)
//! need holes where a file system supports them, and correct bytes everywhere. This crate probes
//! file systems, lists the extents of a file, and writes runs of memory at the speed of the device.
//!
//! # Probe a file system
//!
//! [`Capabilities::probe`] writes a small unnamed file and examines the result. Names of file
//! systems and operating systems decide nothing. The result describes that file only: whether holes
//! of other files are reported correctly is a [separate question](#use-the-holes-of-a-file).
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
//! [`write_runs`] reads the bytes of each run from a [`RunSource`] and writes them at their
//! offsets. If a source provides the [`HostMemory`] that holds its bytes, the kernel reads it
//! directly: without a copy, and without a Rust reference, so that vCPUs may write to it
//! concurrently. [`grow`] sets the length of the file, including trailing clean pages.
//!
//! ```
//! use sparse_file::{RunSource, WriteError, WriteOptions, grow, write_runs};
//! use std::{io, ops::ControlFlow};
//!
//! /// A guest of 1 GiB that answers for its memory over some protocol.
//! struct Remote;
//!
//! impl RunSource for Remote {
//!     fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
//!         buf.fill((offset >> 12) as u8);
//!         Ok(())
//!     }
//! }
//!
//! let file = tempfile::tempfile()?;
//! grow(&file, 1 << 30)?;
//! let runs = [0..16384, 1 << 20..(1 << 20) + 4096];
//! let go_on = &mut |_| ControlFlow::Continue(());
//! match write_runs(&file, runs, &Remote, &WriteOptions::new(), go_on) {
//!     Ok(bytes) => assert_eq!(bytes, 20480),
//!     Err(WriteError::Source { offset, source }) => panic!("no memory at {offset:#x}: {source}"),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ## Engines
//!
//! [`Engine::Auto`] selects an engine by the job, the file and the machine. Each engine can be
//! selected explicitly, and all write the same bytes.
//!
//! - [`Engine::IoUring`]: on Linux, if the file supports direct I/O. Keeps up to 64 requests (32
//!   MiB) in flight, directly from the source's memory to the device.
//! - [`Engine::Threads`]: the same, if io_uring is missing or forbidden (old kernels,
//!   `kernel.io_uring_disabled`, seccomp in containers). 8 threads make direct `pwrite` calls for
//!   ranges of 256 KiB and more. Smaller ranges go through the page cache.
//! - [`Engine::Pwrite`]: without direct I/O, for jobs up to 1 MiB, and if no thread can be
//!   created. Makes one `pwrite` after another, through the page cache.
//! - On macOS always [`Engine::Pwrite`], with `F_NOCACHE` for jobs of more than 1 MiB.
//!
//! Direct I/O requires whole aligned blocks. Other data is written separately, range by range:
//!
//! - Parts of blocks at both ends of a run, and ranges that the file system refuses, go through the
//!   page cache.
//! - Memory at an unsuitable address is copied to aligned buffers.
//!
//! A block is never written in both ways at once.
//!
//! ```
//! use sparse_file::{Engine, WriteError, WriteOptions, write_runs};
//! use std::ops::ControlFlow;
//!
//! let ram = vec![7; 4 << 20];
//! let file = tempfile::tempfile()?;
//! let ring = WriteOptions::new().engine(Engine::IoUring);
//! let go_on = &mut |_| ControlFlow::Continue(());
//! match write_runs(&file, [0..4 << 20], ram.as_slice(), &ring, go_on) {
//!     Ok(bytes) => assert_eq!(bytes, 4 << 20),
//!     Err(WriteError::Engine { engine, source }) => println!("{engine:?}: {source}"),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Use the holes of a file
//!
//! Some file systems report holes where there is data: FUSE for pages that were written through a
//! mapping, older OpenZFS for data that was not written out, APFS inside clones. They report no
//! error. A hole is therefore used only if the implementation is known. Everything else counts as
//! data.
//!
//! - [`extents`](crate::extents()) and [`extents_in`] skip the parts of a RAM file that a guest
//!   never touched, even while the guest runs, and the zeros of an image. They use the holes of
//!   ext4, XFS, btrfs, tmpfs and memfds on Linux, and of overlayfs (containers) over the first
//!   three; on ext4 of files with extents. Elsewhere the whole file is data and is read.
//!   [`check_holes_are_zeros`] returns the reason.
//! - [`PageHoles`] identifies the pages of a diff by the holes between them: on the same file
//!   systems, in pages of at least a block and 4 KiB, after a sync and a probe of the directory.
//!   Elsewhere it refuses: keep a list of the pages.
//! - [`reported_extents`] lists what a file system reports, correct or not.
//!
//! Reading a hole instead of skipping it takes some seconds for each 10 GiB of a sparse file, at
//! the speed of the page cache. The bytes are the same.
//!
//! # Allocate and free blocks
//!
//! [`reserve`] allocates blocks in advance, [`punch_hole`] frees them, [`share_blocks`] shares
//! those of another file (reflink), and [`allocated_bytes`] counts them. [`zero_range`] punches a
//! hole, or writes zeros where there are no holes.
//!
//! # Measured behavior of file systems
//!
//! Results for a sparse file with a few pages, after `fsync`. The tests of this crate check ext4,
//! XFS, btrfs, tmpfs and exFAT (FUSE). The others were measured once with the drivers of Linux 6.1.
//!
//! | file system | holes | `SEEK_HOLE` | punching | direct I/O |
//! |---|---|---|---|---|
//! | ext4, XFS, btrfs | yes | exact | frees | yes |
//! | tmpfs | yes | exact | frees | accepted, without effect |
//! | exFAT (FUSE and kernel driver) | **none** | all data | no | yes |
//! | HFS+ | **none** | all data | no | yes |
//! | APFS (linux-apfs-rw 0.3.0) | unknown: `st_blocks` is 0 | all data | no | no |
//! | NFS v3 over ext4 | those of the server | all data | no | yes |
//! | NFS v4.2 over ext4 | those of the server | exact | yes | yes |
//!
//! On exFAT and HFS+ a diff is therefore stored densely, with correct bytes, and its pages cannot
//! be distinguished from holes: store a map of the pages beside the bytes. The reports of NFS v4.2
//! are exact but not used, because the server decides them.
//!
//! # How it works
//!
//! - Probing: `O_TMPFILE` (or create and unlink), `ftruncate`, some `pwrite`, `fsync`, then
//!   `fstat`, `lseek`, `statx` (`STATX_DIOALIGN`), `fcntl(F_SETFL, O_DIRECT)` with aligned `pwrite`
//!   and `pread`, and `fallocate(PUNCH_HOLE)`.
//! - Extents: one `fstat`, one `fstatfs`, one `lseek` an extent. On ext4 `ioctl(FS_IOC_GETFLAGS)`,
//!   and on overlayfs `ioctl(FS_IOC_FIEMAP)`, `FS_IOC_GETFLAGS` and `statx`, or `fgetxattr`, before
//!   the first and after each hole. `ENXIO` from `SEEK_HOLE` is never a hole, and from
//!   `SEEK_DATA` only if `SEEK_HOLE` has just returned that offset.
//! - Positioned writes: one `getrlimit`, then one `pwrite` a chunk of at most 1 MiB, cut at
//!   multiples of 1 MiB. Interrupted and short writes and `EAGAIN` are retried.
//! - Writes with requests in flight: `open` of `/proc/self/fd/N` with `O_DIRECT`,
//!   `statx(STATX_DIOALIGN)`, then `io_uring_setup` and one `io_uring_enter` for some requests of
//!   at most 1 MiB, or `clone3` and `pwrite`. A request that is short, interrupted or refused is
//!   finished by `pwrite` through the page cache.
//! - `RLIMIT_FSIZE` is checked before a write for which the kernel would send the fatal signal
//!   `SIGXFSZ`. `EFBIG` is returned instead.
//!
//! # Limitations
//!
//! - Linux and macOS only. The calls of macOS are type-checked and were never run. The decisions
//!   about them are tested on Linux.
//! - The crate neither syncs files for durability nor replaces them atomically. The caller does
//!   both.
//! - If another thread lowers `RLIMIT_FSIZE` while [`write_runs`] runs, this is not noticed.
//! - Direct I/O needs a second descriptor. A file that is open for appending, that cannot be
//!   reopened for writing, or that is not reachable at `/proc/self/fd` is written through the page
//!   cache.
//! - macOS does not report whether `F_NOCACHE` is set on a file: it is cleared after
//!   [`write_runs`].
//! - If another program changes a file, its extents may be outdated.
//!
//! # Cargo features
//!
//! - `tracing` (off by default): emits events of the crate [`tracing`](https://docs.rs/tracing), or
//!   records of the crate [`log`](https://docs.rs/log) if the program has no subscriber of
//!   `tracing`. They state which engine writes and why no faster one does, that direct I/O was
//!   refused, and that holes are not trusted. No event contains bytes of memory.

#[cfg(test)]
mod auto_traits;
mod extents;
mod holes;
mod identity;
mod limit;
mod page_holes;
mod probe;
mod progress;
mod space;
mod sys;
mod trace;
mod write;
mod zero;

pub use extents::{
    Extent, ExtentKind, ExtentSource, Extents, extents, extents_in, reported_extents,
};
pub use holes::{HolesUnknown, check_holes_are_zeros, file_system_name, is_on_disk};
pub use host_memory::HostMemory;
pub use identity::FileIdentity;
pub use page_holes::{PageHoles, PagesUnknown};
pub use probe::{
    AlignmentBasis, Capabilities, DirectIo, HoleSupport, ProbeError, Punch, SeekHole, WrittenZeros,
};
pub use progress::{CancelGuard, CancelToken, Pass, Progress, ProgressFn};
pub use space::{SpaceError, allocated_bytes, check_len, grow, punch_hole, reserve, share_blocks};
pub use write::{
    Engine, EngineChoice, EngineReason, RunSource, WriteError, WriteOptions, write_runs,
};
pub use zero::{ZeroError, zero_range, zero_ranges};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
