//! A file whose missing pages wait for a userfaultfd in one mapping, and are zeros everywhere else.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// From Linux `include/uapi/linux/userfaultfd.h`: requests, and the mode of missing pages.
const NEW: libc::c_ulong = 0xaa00;
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const MODE_MISSING: u64 = 1;

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
    let device = File::open("/dev/userfaultfd").unwrap();
    let mut api = [0xaa_u64, 0, 0];
    let mut range = [start.addr().get() as u64, len, MODE_MISSING, 0];
    // SAFETY: the first request gives a new descriptor; the others read and write the arrays, which
    // are laid out as `struct uffdio_api` and `struct uffdio_register`. Nothing accesses the
    // mapping.
    unsafe {
        let fault = Errno::result(libc::ioctl(device.as_raw_fd(), NEW as _, 0)).unwrap();
        let fault = OwnedFd::from_raw_fd(fault);
        let agreed = libc::ioctl(fault.as_raw_fd(), API as _, api.as_mut_ptr());
        Errno::result(agreed).unwrap();
        let registered = libc::ioctl(fault.as_raw_fd(), REGISTER as _, range.as_mut_ptr());
        Errno::result(registered).unwrap();
        fault
    }
}
