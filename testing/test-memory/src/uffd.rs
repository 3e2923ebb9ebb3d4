//! Registration of memory with a userfaultfd.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::mapping::Mapping;

/// `struct uffdio_api`, from Linux `include/uapi/linux/userfaultfd.h`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

mod ioctl {
    nix::ioctl_none!(new, 0xaa, 0x00);
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, super::Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, super::Register);
    nix::ioctl_read!(unregister, 0xaa, 0x01, super::Range);
}

/// Memory that is registered for page faults until this value is dropped.
pub struct Registered {
    fault: OwnedFd,
    range: Range,
}

/// Unregisters the memory. Closing is not sufficient: a child that another test forks may inherit
/// the descriptor.
impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: the kernel reads the structure.
        unsafe { ioctl::unregister(self.fault.as_raw_fd(), &raw mut self.range) }.unwrap();
    }
}

/// Registers the first `len` bytes for missing pages. Their faults are not handled.
pub fn register_missing(mapping: &Mapping, len: usize) -> Registered {
    register(mapping, len, 1, 0)
}

/// Registers the first `len` bytes of shared memory for pages that the file has and the mapping
/// does not have.
pub fn register_minor(mapping: &Mapping, len: usize) -> Registered {
    // UFFDIO_REGISTER_MODE_MINOR, UFFD_FEATURE_MINOR_SHMEM
    register(mapping, len, 4, 1 << 10)
}

fn register(mapping: &Mapping, len: usize, mode: u64, features: u64) -> Registered {
    let device = File::open("/dev/userfaultfd").unwrap();
    let mut api = Api {
        api: 0xaa,
        features,
        ioctls: 0,
    };
    let (start, len) = (mapping.address(), len as u64);
    let mut register = Register {
        start,
        len,
        mode,
        ioctls: 0,
    };
    // SAFETY: USERFAULTFD_IOC_NEW returns a descriptor without another owner. The other calls read
    // and write local structures. The range is not accessed while it is registered.
    unsafe {
        let fault = OwnedFd::from_raw_fd(ioctl::new(device.as_raw_fd()).unwrap());
        ioctl::api(fault.as_raw_fd(), &raw mut api).unwrap();
        ioctl::register(fault.as_raw_fd(), &raw mut register).unwrap();
        let range = Range { start, len };
        Registered { fault, range }
    }
}
