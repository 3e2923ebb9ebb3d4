//! Anonymous memory of this process, used as an embedded guest's RAM. No reference ever covers it.

#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
#[cfg(target_os = "linux")]
use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{HostMemory, PageReader};

/// A private anonymous mapping.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and is accessed by volatile loads and stores only.
unsafe impl Send for Memory {}
// SAFETY: as above; what a racing load sees is one word or the other, as of any guest's memory.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes of zeros.
    pub fn new(len: u64) -> io::Result<Self> {
        let size = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        let size = size.ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let kind = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces none.
        let start = unsafe { mmap_anonymous(None, size, access, kind)? }.cast();
        let memory = Self {
            start,
            len: size.get(),
        };
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping made above. Pages are tracked singly, so the kernel needn't make huge ones.
        // Kernels without huge pages refuse, which is as good.
        let _ = unsafe { madvise(start.cast(), memory.len, MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(memory)
    }

    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The word at `offset`, which must be aligned to it.
    pub fn load(&self, offset: u64) -> u64 {
        // SAFETY: `word` keeps the address inside the mapping, which is readable for its whole life, and aligned.
        unsafe { self.word(offset).read_volatile() }
    }

    /// Replaces the word at `offset`. A page protected by a tracker faults, is marked and becomes writable.
    pub fn store(&self, offset: u64, word: u64) {
        // SAFETY: as for `load`; a tracker makes the page writable in its fault handler before the store is repeated.
        unsafe { self.word(offset).write_volatile(word) }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let inside = offset.checked_add(bytes.len() as u64);
        assert!(inside.is_some_and(|end| end <= self.len as u64));
        // SAFETY: just checked to be inside the mapping, which no slice overlaps.
        unsafe {
            let to = self.start.add(offset as usize).as_ptr();
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// Makes a range of whole pages writable or not.
    pub fn set_writable(&self, range: Range<usize>, writable: bool) -> nix::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        let access = if writable {
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
        } else {
            ProtFlags::PROT_READ
        };
        // SAFETY: checked above to be inside the mapping, to which no reference exists; it stays readable.
        unsafe {
            let start = self.start.add(range.start);
            mprotect(start.cast(), range.len(), access)
        }
    }

    fn word(&self, offset: u64) -> *mut u64 {
        let fits = offset.is_multiple_of(8) && offset < self.len as u64;
        assert!(
            fits,
            "offset {offset:#x} in an embedded guest's RAM of {:#x} bytes",
            self.len
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.start.add(offset as usize) }.as_ptr().cast()
    }
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
        // SAFETY: inside the mapping, by the line above; it is readable as long as `self` lives, and written by volatile
        // stores only.
        (len > 0).then(|| unsafe { HostMemory::new(self.start.as_ptr().add(offset), len) })
    }
}

/// The bytes of a page of this machine.
pub fn page_size() -> io::Result<u64> {
    let size = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| u64::try_from(size).ok());
    size.ok_or_else(|| io::Error::other("this machine does not tell its page size"))
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`; whoever could access it holds a borrow of `self`.
        let unmapped = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
