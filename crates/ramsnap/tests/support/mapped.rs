//! A file that a process has mapped.

use std::fs::File;
use std::num::NonZeroUsize;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Maps the first `len` bytes of `file` shared, and never unmaps them.
pub(crate) fn map(file: &File, len: u64) {
    let len = NonZeroUsize::new(len as usize).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, where the kernel chooses.
    unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) }.unwrap();
}
