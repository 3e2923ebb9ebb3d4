//! `MADV_POPULATE_READ`: maps pages like loads of them, with errors instead of `SIGBUS`.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use host_memory::HostMemory;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MmapAdvise, madvise};

use super::page_size;
use super::userfaultfd::Userfaultfd;

/// Maps the pages of `memory`, which must not be empty.
pub(crate) fn fault_in(memory: HostMemory<'_>) -> io::Result<()> {
    let unaligned = memory.as_ptr().addr() % page_size() as usize;
    let start = memory.as_ptr().wrapping_sub(unaligned).cast_mut();
    let Some(start) = NonNull::new(start.cast::<libc::c_void>()) else {
        return Err(Errno::EFAULT.into());
    };
    let len = memory.len() + unaligned;
    loop {
        // SAFETY: this advice neither changes nor drops bytes. The kernel checks the range, which
        // is mapped by the promise of `HostMemory::new`.
        match unsafe { madvise(start, len, MmapAdvise::MADV_POPULATE_READ) } {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // A kernel without this advice, or device memory.
            Err(Errno::EINVAL) => return Ok(()),
            // A userfaultfd for user-mode faults only rejects faults of the kernel.
            Err(Errno::EFAULT) if is_filled_for_loads(start.addr().get(), len) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Returns `true` if a userfaultfd is registered for any of the pages.
fn is_filled_for_loads(start: usize, len: usize) -> bool {
    let Some(userfaultfd) = Userfaultfd::probe() else {
        return false;
    };
    let mut pages = (start..start + len).step_by(page_size() as usize);
    pages.any(|page| !userfaultfd.is_unregistered(page as u64))
}
