//! Where the bytes of a guest's RAM come from: the [`PageReader`] trait, its sources, and the layout of
//! guest-physical memory.
//!
//! Whatever saves, sends, hashes or inspects a virtual machine's memory reads it through one call,
//! [`PageReader::read_at`], by the offset in the *memory file*: all RAM regions packed one after another. Where a
//! source has the bytes mapped it also hands out their [host address](PageReader::host_memory), so that the kernel can
//! write them to a file straight from guest memory, without a copy in user space.
//!
//! | the guest's RAM is ... | source |
//! |---|---|
//! | mapped in this process, vCPUs may be writing it | [`MappedMemory`] |
//! | in `vm-memory`'s types | `GuestMemoryReader` (feature `vm-memory`) |
//! | in a file or memfd that the guest maps shared, or an image on disk | [`FileReader`] |
//! | in another process (Linux) | `ProcessMemory`; `ProcessMaps` finds it there, `StoppedProcess` stops the process |
//! | in ordinary memory | `[u8]`, `Vec<u8>` |
//! | in several of these, side by side or over one another | [`Layered`] |
//! | in any of these, most of it never touched and not to be | [`Touched`] |
//! | anywhere else | your own `impl PageReader`: one method, and two that may be left out |
//!
//! # Examples
//!
//! ## Reading a guest with an MMIO gap
//! ```
//! use page_reader::{FileReader, Layered, PageReader, RamLayout};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const MIB: u64 = 1 << 20;
//! // 2 MiB at 0 and 1 MiB at 4 GiB, each in a file (or memfd) of its own.
//! let layout = RamLayout::new([(0, 2 * MIB), (4096 * MIB, MIB)])?;
//! # let file_of = |byte, size| -> std::io::Result<std::fs::File> {
//! #     use std::io::Write;
//! #     let mut file = tempfile::tempfile()?;
//! #     file.write_all(&vec![byte; size as usize])?;
//! #     Ok(file)
//! # };
//! # let (low, high) = (file_of(1, 2 * MIB)?, file_of(2, MIB)?);
//! let guest = Layered::concat([
//!     (FileReader::new(low), 2 * MIB),
//!     (FileReader::new(high), MIB),
//! ])?;
//!
//! // 8 bytes at a guest-physical address:
//! let offset = layout.offset_of(4096 * MIB + 0x1000).ok_or("not RAM")?;
//! let mut word = [0; 8];
//! guest.read_at(offset, &mut word)?;
//! assert_eq!(word, [2; 8]);
//! # Ok(())
//! # }
//! ```
//!
//! ## Saving a guest, without copying where that's possible
//! ```
//! use std::io::{self, Write};
//! use page_reader::PageReader;
//!
//! /// Writes `size` bytes of RAM to `file`: from where they are, or through a buffer.
//! fn save(guest: &dyn PageReader, size: u64, file: &mut std::fs::File) -> io::Result<()> {
//!     let mut buf = vec![0; 1 << 20];
//!     let mut offset = 0;
//!     while offset < size {
//!         let len = (size - offset).min(buf.len() as u64) as usize;
//!         let written = match guest.host_memory(offset, len) {
//!             // SAFETY: mapped, by HostMemory's contract, for as long as `guest` is borrowed.
//!             Some(memory) => match unsafe { write(file, memory.as_ptr(), memory.len()) } {
//!                 -1 => return Err(io::Error::last_os_error()),
//!                 written => written as usize,
//!             },
//!             None => {
//!                 guest.read_at(offset, &mut buf[..len])?;
//!                 file.write(&buf[..len])?
//!             }
//!         };
//!         offset += written as u64;
//!     }
//!     Ok(())
//! }
//! # unsafe fn write(file: &std::fs::File, from: *const u8, len: usize) -> isize {
//! #     use std::os::fd::AsRawFd;
//! #     unsafe { libc::write(file.as_raw_fd(), from.cast(), len) }
//! # }
//! # use std::os::unix::fs::FileExt;
//! # let ram = vec![7; 3 << 20];
//! # let mut file = tempfile::tempfile()?;
//! # save(&ram, ram.len() as u64, &mut file)?;
//! # let mut saved = vec![0; ram.len()];
//! # file.read_exact_at(&mut saved, 0)?;
//! # assert!(saved == ram);
//! # Ok::<(), io::Error>(())
//! ```
//!
//! # How it works
//!
//! - Mapped memory is copied by atomic loads of machine words, at two thirds of `memcpy`'s speed or better, as measured
//!   from memory outside the caches. No Rust reference ever claims that its bytes stay as they are: vCPUs write them.
//! - Files are read with `pread`, repeated after `EINTR` and short reads. Their position isn't used.
//! - Another process's memory is read with `pread` of `/proc/<pid>/mem`, opened once: it stays that process's, also
//!   when the id is in use again. It's stopped by `PTRACE_SEIZE` and `PTRACE_INTERRUPT` of every thread, from a thread of its own: when
//!   that ends, or is killed with its process, the kernel lets all of them go on.
//! - Layouts and layers find their place by binary search; a read that crosses regions is one read for each.
//!
//! - Which RAM was never touched is asked of the kernel, not read: `/proc/self/maps` (of another process, `smaps`) says what kind of memory it is, then `PAGEMAP_SCAN`
//!   (Linux 6.7; before that the entries of `/proc/self/pagemap`) or, for files and shared memory, `lseek(SEEK_DATA)` says where
//!   there are pages. `mincore` isn't used: to it a page that was swapped out is one that isn't there. That userfaultfd has none of the
//!   memory is asked of a userfaultfd of one's own, in 0.1 ms; where it has some, or `userfaultfd(2)` may not be called, by
//!   `smaps`, for which the kernel looks at every page of the process (14 to 30 ms a GiB in small pages).
//!
//! Every range is checked before it's touched: past the end is
//! [`UnexpectedEof`](std::io::ErrorKind::UnexpectedEof), never a panic and never a short read.
//!
//! # Limitations
//!
//! - Reading doesn't stop the guest: bytes read while vCPUs run are as of no one instant. Pause them, stop the other process, or read
//!   again what a dirty log says has changed.
//! - A load from a mapped file that was truncated is a SIGBUS, not an error. Seal memfds against shrinking. So is a load of a page that
//!   can't be had, on a full tmpfs or without a huge page left: [`HostMemory::fault_in`] finds out before.
//! - Shared memory of which this process has no descriptor, and whose mappings it may not open (`CAP_CHECKPOINT_RESTORE`), may be populated
//!   everywhere. Reading the pages of it that were never touched allocates them.
//! - [`populated`](PageReader::populated) knows of a file only on ext4, XFS, btrfs and tmpfs, memfds
//!   included, on overlayfs over the first three, and by reading it on hugetlbfs: elsewhere (FUSE,
//!   network file systems, macOS) all of it may be populated, and has to be read. `sparse_file::check_holes_are_zeros` says why.
//! - Of memory, `populated` calls `userfaultfd(2)`: a seccomp filter may refuse that, but should not
//!   kill for it.
//! - Shared memory that a process is still filling by userfaultfd reads as zeros where pages are
//!   missing. `check_filled` (Linux) finds such a process: call it before and after a copy.
//! - `ProcessMemory`, `ProcessMaps`, `StoppedProcess` and `check_filled` are Linux only. Everything else is for Linux and macOS.
//!
//! # Features
//!
//! None is on by default.
//!
//! - `serde`: [`RamLayout`] serialises as its regions, and is validated when deserialised.
//! - `vm-memory`: `GuestMemoryReader`, over the guest memory of the `vm-memory` crate.

mod bytes;
mod file;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod host_memory;
mod layered;
mod layout;
mod mapped;
mod populated;
#[cfg(target_os = "linux")]
mod process;
mod range;
mod reader;
mod secret;
#[cfg(target_os = "linux")]
mod sys;
mod touched;

pub use file::FileReader;
#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestMemoryReader;
pub use host_memory::HostMemory;
pub use layered::{Layered, LayeredError};
pub use layout::{LayoutError, OutsideRam, RamLayout, RamRange};
pub use mapped::{MappedMemory, MappedMemoryError};
pub use populated::PopulatedRanges;
#[cfg(target_os = "linux")]
pub use process::{
    FlaggedRegion, LazyFillError, Permissions, ProcessMaps, ProcessMapsError, ProcessMemory,
    ProcessMemoryError, ProcessRegion, ProcessStopError, RegionFlags, StoppedProcess,
    UnexaminedProcess, Unresponsive, check_filled,
};
pub use reader::PageReader;
pub use secret::SecretBuffer;
pub use touched::Touched;

/// The README's example, as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
