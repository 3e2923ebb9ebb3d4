//! A guest's bytes, and mappings to hold them.

#![allow(dead_code, unsafe_code)] // each test binary uses its part

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use page_reader::HostMemory;

pub(crate) const PAGE: usize = 4096;

/// Bytes of which no two neighbouring pages, and no two words of a page, are alike.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Anonymous memory, shared with forked children or private to each.
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

impl Mapping {
    pub(crate) fn shared(len: usize) -> Self {
        Self::new(len, MapFlags::MAP_SHARED)
    }

    pub(crate) fn private_with(bytes: &[u8]) -> Self {
        let mapping = Self::new(bytes.len(), MapFlags::MAP_PRIVATE);
        mapping.write(bytes);
        mapping
    }

    fn new(len: usize, flags: MapFlags) -> Self {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = NonZeroUsize::new(len).unwrap();
        // SAFETY: a new mapping, where the kernel likes.
        let start = unsafe { mmap_anonymous(None, len, protection, flags) }.unwrap();
        Self {
            start,
            len: len.get(),
        }
    }

    pub(crate) fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: mapped, writable, and written by nobody else in these tests while this runs.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr(), bytes.len()) }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    pub(crate) fn address(&self) -> u64 {
        self.as_ptr() as u64
    }

    pub(crate) fn memory(&self) -> HostMemory<'_> {
        // SAFETY: mapped until drop, which the borrow holds off; written through raw pointers only.
        unsafe { HostMemory::new(self.as_ptr(), self.len) }
    }
}

// SAFETY: an address range, that any thread may use.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no borrow of it is left.
        unsafe { munmap(self.start, self.len) }.unwrap();
    }
}
