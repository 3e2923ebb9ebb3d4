//! A file whose missing pages wait for a userfaultfd in one mapping, and are zeros everywhere else.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use uffd::{Modes, Userfaultfd};

/// Maps the first `len` bytes of `file`, never unmaps them, and registers the mapping until the
/// descriptor is closed.
pub(crate) fn register(file: &File, len: u64) -> OwnedFd {
    let length = NonZeroUsize::new(len as usize).unwrap();
    let (protection, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_SHARED,
    );
    // SAFETY: a new mapping, where the kernel chooses.
    let start = unsafe { mmap(None, length, protection, flags, file, 0) }.unwrap();
    let start = start.addr().get() as u64;
    let fault = Userfaultfd::options().open().unwrap();
    // SAFETY: mapped, and nothing accesses the mapping.
    unsafe { fault.register(start..start + len, Modes::MISSING) }.unwrap();
    fault.into()
}
