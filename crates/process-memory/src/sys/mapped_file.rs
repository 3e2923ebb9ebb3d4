//! A file as listed in the mappings of a process. On overlayfs, device and possibly inode differ
//! from those that `fstat` returns.

#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

/// A mapping of the first block of a file.
///
/// The mapping is never accessed, so that it changes nothing: an access would allocate a missing
/// page.
#[derive(Debug)]
pub(crate) struct MappedFile {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

impl MappedFile {
    pub(crate) fn new(file: &File) -> nix::Result<Self> {
        // The block size of a file in huge pages is that of a huge page, the smallest possible
        // mapping.
        let block = file.metadata().map_or(0, |metadata| metadata.blksize());
        let page_size = sysconf(SysconfVar::PAGE_SIZE)?.ok_or(Errno::ENOSYS)? as u64;
        let len = usize::try_from(block.max(1).next_multiple_of(page_size));
        let len = len
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(Errno::EOVERFLOW)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_NONE, flags, file, 0) }?;
        Ok(Self { start, len })
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and accessed by no code.
        let unmapped = unsafe { munmap(self.start, self.len.get()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
