//! `MADV_POPULATE_READ`: mapping pages as loads of them would, with errors in place of `SIGBUS`.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MmapAdvise, madvise};

use super::page_size;
use super::userfaultfd::Userfaultfd;
use crate::HostMemory;

/// Maps the pages that `memory`, not empty, is in.
pub(crate) fn fault_in(memory: HostMemory<'_>) -> io::Result<()> {
    let unaligned = memory.as_ptr().addr() % page_size() as usize;
    let start = memory.as_ptr().wrapping_sub(unaligned).cast_mut();
    let Some(start) = NonNull::new(start.cast::<libc::c_void>()) else {
        return Err(Errno::EFAULT.into());
    };
    let len = memory.len() + unaligned;
    loop {
        // SAFETY: this advice changes no byte, and drops none; the kernel checks the range, which is
        // mapped by the promise of `HostMemory::new`.
        match unsafe { madvise(start, len, MmapAdvise::MADV_POPULATE_READ) } {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // A kernel that has no such advice, or memory of a device.
            Err(Errno::EINVAL) => return Ok(()),
            // A userfaultfd that fills pages for loads alone refuses the kernel.
            Err(Errno::EFAULT) if is_filled_for_loads(start.addr().get(), len) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_filled_for_loads(start: usize, len: usize) -> bool {
    let Some(userfaultfd) = Userfaultfd::that_tells() else {
        return false;
    };
    let mut pages = (start..start + len).step_by(page_size() as usize);
    pages.any(|page| !userfaultfd.leaves_alone(page as u64))
}
