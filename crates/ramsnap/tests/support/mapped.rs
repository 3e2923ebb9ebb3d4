//! A file that a process has mapped.

use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};

use crate::support::PAGE;

/// Maps the first `len` bytes of `file` shared, and never unmaps them.
pub(crate) fn map(file: &File, len: u64) -> NonNull<c_void> {
    let len = NonZeroUsize::new(len as usize).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, where the kernel chooses.
    unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) }.unwrap()
}

/// Reads every page of a mapping of `len` bytes.
pub(crate) fn touch(start: NonNull<c_void>, len: u64) {
    // SAFETY: the advice changes no byte.
    unsafe { madvise(start, len as usize, MmapAdvise::MADV_POPULATE_READ) }.unwrap();
}

/// Splits a mapping of at least three pages: its middle gets a flag.
pub(crate) fn split(start: NonNull<c_void>) {
    let page = PAGE as usize;
    // SAFETY: the page is inside the mapping, and this process does not fork.
    let middle = unsafe { start.byte_add(page) };
    // SAFETY: as above.
    unsafe { madvise(middle, page, MmapAdvise::MADV_DONTFORK) }.unwrap();
}
