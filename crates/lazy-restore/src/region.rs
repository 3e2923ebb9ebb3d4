//! New memory for a guest's RAM.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};

/// A range of private, anonymous memory. Dropping it unmaps the memory.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping is not tied to a thread; `munmap` may be called from any thread.
unsafe impl Send for Region {}
// SAFETY: `&self` only gives out an address.
unsafe impl Sync for Region {}

impl Region {
    /// Maps zeros.
    pub(crate) fn zeros(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or(io::ErrorKind::OutOfMemory)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // No swap is reserved: a guest rarely writes all of its RAM.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: no address is requested, so the kernel picks an unused range.
        let start = unsafe { mmap_anonymous(None, len, protection, flags) }?;
        Ok(Self { start, len })
    }

    /// Returns the address of the first byte, aligned to the host's page.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Returns the size in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `mmap` returned, and borrows of it ended with `self`.
        // The call fails only for an unaligned address.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

/// Returns the page size of this machine in bytes.
pub(crate) fn host_page() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|page| u64::try_from(page).ok())
        .expect("POSIX requires a page size")
}
