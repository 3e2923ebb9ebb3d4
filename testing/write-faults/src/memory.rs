//! Memory mapped in this process that serves as a guest's RAM. No reference ever covers it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(target_os = "linux")]
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
#[cfg(target_os = "linux")]
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{HostMemory, PageReader};

/// A mapping of this process. It is readable and, unless write-protected, writable.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and is accessed by atomic loads and
// stores only.
unsafe impl Send for Memory {}
// SAFETY: as above. A racing load returns the old or the new word, as from any guest's memory.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes of zeros.
    ///
    /// # Errors
    /// Those of `mmap`; [`InvalidInput`](io::ErrorKind::InvalidInput) for a `len` of 0.
    pub fn new(len: u64) -> io::Result<Self> {
        let size = size(len)?;
        let kind = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces none.
        let start = unsafe { mmap_anonymous(None, size, READ_WRITE, kind)? };
        Ok(Self::in_small_pages(start.cast(), size))
    }

    /// Maps a new file of `len` bytes. Bytes that are written to the file through its descriptor
    /// appear in the memory and never fault, like a hypervisor host's writes to its guest.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of creating the file.
    pub fn shared(len: u64) -> io::Result<(Self, File)> {
        let size = size(len)?;
        #[cfg(target_os = "linux")]
        let file = File::from(memfd_create(c"memory", MFdFlags::MFD_CLOEXEC)?);
        #[cfg(not(target_os = "linux"))]
        let file = tempfile::tempfile()?;
        file.set_len(len)?;
        // SAFETY: as above. The file has this length, and no other process has it open yet. If it
        // is truncated, loads past its end fail and do not reach other objects.
        let start = unsafe { mmap(None, size, READ_WRITE, MapFlags::MAP_SHARED, &file, 0)? };
        Ok((Self::in_small_pages(start.cast(), size), file))
    }

    fn in_small_pages(start: NonNull<u8>, len: NonZeroUsize) -> Self {
        let len = len.get();
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the new mapping. Pages are tracked singly, so huge pages are of no
        // use. Kernels without huge pages refuse the call, which has the same effect.
        let _ = unsafe { madvise(start.cast(), len, MmapAdvise::MADV_NOHUGEPAGE) };
        Self { start, len }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Returns the length in bytes, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the word at `offset`.
    ///
    /// # Panics
    /// Panics if the offset is not a multiple of 8 inside the memory.
    #[must_use]
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: `word` keeps the address inside the mapping, which is readable for its whole
        // life, and aligned.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.load(Ordering::Relaxed)
    }

    /// Replaces the word at `offset`. Faults if the page is protected.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    pub fn store(&self, offset: u64, word: u64) {
        // SAFETY: as for `load`; a protected page is made writable in the fault handler before the
        // store is repeated.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.store(word, Ordering::Relaxed);
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// Panics if they do not fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let inside = offset.checked_add(bytes.len() as u64);
        assert!(inside.is_some_and(|end| end <= self.len as u64));
        // SAFETY: just checked to be inside the mapping, which no slice overlaps.
        unsafe {
            let to = self.start.add(offset as usize).as_ptr();
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Sets whether a range of whole pages is writable.
    pub(super) fn set_writable(&self, range: Range<u64>, writable: bool) -> nix::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len as u64);
        let access = if writable {
            READ_WRITE
        } else {
            ProtFlags::PROT_READ
        };
        // SAFETY: checked above to be inside the mapping, to which no reference exists; it stays
        // readable.
        unsafe {
            let start = self.start.add(range.start as usize);
            mprotect(start.cast(), (range.end - range.start) as usize, access)
        }
    }

    fn word(&self, offset: u64) -> *mut u64 {
        let fits = offset.is_multiple_of(8) && offset < self.len as u64;
        assert!(
            fits,
            "no word at offset {offset:#x} of a memory of {:#x} bytes",
            self.len
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.start.add(offset as usize) }.as_ptr().cast()
    }
}

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

fn size(len: u64) -> io::Result<NonZeroUsize> {
    let size = usize::try_from(len).ok().and_then(NonZeroUsize::new);
    size.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl PageReader for Memory {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let memory = self.host_memory(offset, buf.len());
        let memory = memory.filter(|memory| memory.len() == buf.len());
        memory.ok_or(io::ErrorKind::UnexpectedEof)?.copy_to(buf);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let offset = usize::try_from(offset).ok()?;
        let len = len.min(self.len.checked_sub(offset)?);
        // SAFETY: inside the mapping, by the line above; it is readable as long as `self` lives,
        // and written by atomic stores only.
        (len > 0).then(|| unsafe { HostMemory::new(self.start.as_ptr().add(offset), len) })
    }
}

/// Returns the page size of this machine in bytes.
///
/// # Errors
/// The error of the system if it does not report the size.
pub fn page_size() -> io::Result<u64> {
    let size = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| u64::try_from(size).ok());
    size.ok_or_else(|| io::Error::other("this machine does not report its page size"))
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new` or `shared`; every access borrows `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
