//! Reads a virtual machine's RAM from mapped memory, files, memfds and images.
//!
//! Code that saves, migrates or inspects a virtual machine reads its RAM, often while vCPUs write
//! it. The RAM is in a different place in each VMM. This crate provides one trait for all of them,
//! [`PageReader`], and [`RamLayout`], which converts guest-physical addresses to offsets.
//!
//! ```
//! use page_reader::{FileReader, PageReader, RamLayout};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memfd = tempfile::tempfile()?;
//! # memfd.set_len(5 << 30)?;
//! // 5 GiB of RAM in a memfd. The guest has an MMIO gap from 3 to 4 GiB, the memfd has none.
//! let layout = RamLayout::x86_with_gap(5 << 30)?;
//! let guest = FileReader::new(memfd);
//!
//! let offset = layout.offset_of(4 << 30).ok_or("not RAM")?;
//! let mut page = [1; 4096];
//! guest.read_at(offset, &mut page)?;
//! # assert_eq!(page, [0; 4096]);
//! # Ok(())
//! # }
//! ```
//!
//! # Sources
//!
//! | location of the RAM | source |
//! |---|---|
//! | mapped in this process, vCPUs may write it | [`MappedMemory`] |
//! | the types of the `vm-memory` crate | `GuestMemoryReader` (feature `vm-memory`) |
//! | a file or memfd that the VMM maps shared, an image on disk | [`FileReader`] |
//! | another process (Linux) | `ProcessMemory` of the crate `process-memory` |
//! | ordinary memory | `[u8]`, `[u8; N]`, `Vec<u8>` |
//! | several of these, adjacent or overlaid | [`Layered`] |
//! | any of these, without touching pages that were never written | [`Touched`] |
//! | anywhere else | your `impl PageReader`: one required method, four provided ones |
//!
//! A source is addressed by the offset in the *memory file*: all RAM regions, packed in ascending
//! order. A source with mapped memory also returns [host addresses](PageReader::host_memory), so
//! that the kernel can write guest memory to a file without a copy in user space.
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
//! ## Saving a guest, without a copy where possible
//! ```
//! use std::io::{self, Write};
//! use page_reader::PageReader;
//!
//! /// Writes `size` bytes of RAM to `file`, directly or through a buffer.
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
//! - Mapped memory is copied by atomic loads of machine words, at two thirds of `memcpy`'s speed or
//!   better, measured on memory outside the caches. No Rust reference claims that the bytes stay
//!   unchanged, because vCPUs write them.
//! - Files are read with `pread`, which is repeated after `EINTR` and short reads. The position of
//!   the file is not used.
//! - Layouts and layers use binary search. A read that crosses regions is split into one read for
//!   each.
//! - Pages that were never written are found without reading them. `/proc/self/maps` (`smaps` for
//!   another process) lists the kind of each mapping. `PAGEMAP_SCAN` (Linux 6.7; before that, the
//!   entries of `/proc/self/pagemap`) finds the pages of private memory, `lseek(SEEK_DATA)` those
//!   of files and shared memory. `mincore` is not used, because it reports swapped-out pages as
//!   absent. A userfaultfd of this crate detects in 0.1 ms whether another userfaultfd fills the
//!   memory. If one does, or `userfaultfd(2)` is not permitted, `smaps` is read, for which the
//!   kernel visits every page of the process (14 to 30 ms a GiB in small pages).
//!
//! Every range is checked before it is accessed. A range past the end is
//! [`UnexpectedEof`](std::io::ErrorKind::UnexpectedEof), never a panic and never a short read.
//!
//! # Limitations
//!
//! - Reading does not stop the guest: bytes read while vCPUs run are not a point-in-time snapshot.
//!   Pause the vCPUs, stop the other process, or read again the pages that a dirty log reports.
//! - A load from a mapped file that was truncated raises `SIGBUS`; seal memfds against shrinking.
//!   So does a load of a page that cannot be allocated, on a full tmpfs or without a free huge
//!   page. [`fault_in`](fault_in()) reports this as an error beforehand.
//! - Shared memory is reported as populated everywhere if this process has no descriptor of its
//!   file and may not open its mapping (`CAP_CHECKPOINT_RESTORE`). So are System V segments.
//!   Reading pages of them that were never touched allocates them.
//! - [`populated`](PageReader::populated) excludes parts of a file only on ext4, XFS, btrfs and
//!   tmpfs, memfds included, on overlayfs over the first three, and on hugetlbfs, which it reads.
//!   Elsewhere (FUSE, network file systems, macOS) the whole file is reported as populated.
//!   `sparse_file::check_holes_are_zeros` documents the reason.
//! - For mapped memory, `populated` calls `userfaultfd(2)`. A seccomp filter may reject the call,
//!   but must not kill the process for it.
//! - Shared memory that a process still fills by userfaultfd reads as zeros where pages are
//!   missing. `check_lazy_fill` of the crate `process-memory` (Linux) finds such a process; call it
//!   before and after a copy.
//! - The mappings of a process (`ProcessRegion`, `FlaggedRegion`) and their populated addresses
//!   (`AddressSpace`) exist on Linux only. Everything else supports Linux and macOS.
//!
//! # Features
//!
//! No feature is enabled by default.
//!
//! - `serde`: [`RamLayout`] is serialized as its regions, and validated when deserialized.
//! - `vm-memory`: `GuestMemoryReader`, a source for the guest memory of the `vm-memory` crate.

#[cfg(target_os = "linux")]
mod address_space;
#[cfg(test)]
mod auto_traits;
mod bytes;
mod fault_in;
mod file;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod layered;
mod layout;
mod mapped;
#[cfg(target_os = "linux")]
mod mappings;
mod nonzero_runs;
mod populated;
mod populated_memory;
mod reader;
#[cfg(target_os = "linux")]
mod sys;
mod touched;
mod zeros;

#[cfg(target_os = "linux")]
pub use address_space::{AddressSpace, MemoryFiles};
pub use fault_in::fault_in;
// The crates whose types are in public signatures.
#[cfg(feature = "vm-memory")]
pub use vm_memory;

pub use file::FileReader;
#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestMemoryReader;
pub use host_memory::{HostMemory, SecretBuffer};
pub use layered::{Layered, LayeredError};
pub use layout::{LayoutError, OutsideRam, RamLayout, RamRange};
pub use mapped::{MappedMemory, MappedMemoryError};
#[cfg(target_os = "linux")]
pub use mappings::{
    FlaggedRegion, MappingsError, Permissions, ProcessRegion, RegionFlags, printable,
};
pub use nonzero_runs::NonzeroRuns;
pub use populated::PopulatedRanges;
pub use reader::PageReader;
pub use touched::Touched;
pub use zeros::{MIN_ZEROS, ZeroRuns, is_zeros, reads_as_zeros};

/// Compiles the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
