//! KVM's calls by a descriptor, for which `kvm-ioctls` needs the value that created the virtual
//! machine, and the calls that it lacks.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

/// Compares two descriptors (Linux 6.10, include/uapi/linux/fcntl.h).
const F_DUPFD_QUERY: libc::c_int = 1024 + 3;

/// Returns the descriptor of a virtual machine.
pub(crate) fn vm_descriptor(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `vm`, which is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// Returns whether two descriptors are duplicates of each other: whether they have one open file,
/// which for a virtual machine is the virtual machine.
///
/// Calls of this function must not run concurrently.
pub(crate) fn same_open_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: both descriptors are open, and the call accesses no memory.
    let same = unsafe { libc::fcntl(a.as_raw_fd(), F_DUPFD_QUERY, b.as_raw_fd()) };
    match Errno::result(same) {
        Ok(same) => Ok(same == 1),
        // An older kernel, or one whose calls a sandbox restricts.
        Err(_) => same_open_file_by_flag(a, b),
    }
}

/// Does the same on every kernel. `O_NONBLOCK` belongs to the open file, and KVM ignores it:
/// changed through one descriptor, it changes for the other if they are of one file.
pub(crate) fn same_open_file_by_flag(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = |fd: BorrowedFd<'_>| {
        let flags = fcntl(fd, FcntlArg::F_GETFL)?;
        Ok::<_, io::Error>(OFlag::from_bits_retain(flags))
    };
    let before = flags(a)?;
    if flags(b)? != before {
        return Ok(false);
    }
    fcntl(a, FcntlArg::F_SETFL(before ^ OFlag::O_NONBLOCK))?;
    let after = flags(b);
    fcntl(a, FcntlArg::F_SETFL(before))?;
    Ok(after? != before)
}

/// Returns the value of a capability of a virtual machine (`KVM_CHECK_EXTENSION`).
pub(crate) fn check_extension(vm: BorrowedFd<'_>, capability: u32) -> nix::Result<i32> {
    // SAFETY: the call has a number as its argument, and accesses no memory.
    unsafe { ioctl::check_extension(vm.as_raw_fd(), capability as libc::c_int) }
}

/// Enables a capability of a virtual machine (`KVM_ENABLE_CAP`).
pub(crate) fn enable_cap(vm: BorrowedFd<'_>, cap: u32, argument: u64) -> nix::Result<()> {
    let enable = kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    // SAFETY: the descriptor is that of a VM, and KVM reads the structure.
    unsafe { ioctl::enable_cap(vm.as_raw_fd(), &raw const enable) }.map(drop)
}

/// Creates, changes or deletes a memory slot (`KVM_SET_USER_MEMORY_REGION`).
///
/// # Safety
/// The memory is mapped, may be written by a guest, and stays mapped until the slot is deleted.
pub(crate) unsafe fn set_user_memory_region(
    vm: BorrowedFd<'_>,
    memory: &kvm_userspace_memory_region,
) -> nix::Result<()> {
    // SAFETY: the descriptor is that of a VM, and KVM reads the structure. The caller is
    // responsible for the memory in it.
    unsafe { ioctl::set_user_memory_region(vm.as_raw_fd(), memory) }.map(drop)
}

/// Returns the log of a memory slot of `pages` pages, one bit for each (`KVM_GET_DIRTY_LOG`).
pub(crate) fn dirty_log(vm: BorrowedFd<'_>, slot: u32, pages: u64) -> nix::Result<Vec<u64>> {
    let mut words = vec![0u64; pages.div_ceil(64) as usize];
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the descriptor is that of a VM. KVM writes one bit for each page of the slot, in
    // whole words. The slot has `pages` pages: this crate has registered it so, or the contract of
    // `RamSlots::adopt` says so.
    unsafe { ioctl::get_dirty_log(vm.as_raw_fd(), &raw const log) }?;
    Ok(words)
}

/// Clears the pages set in `words` (those of the log from `first_page` on) in KVM's log, and
/// protects them again (`KVM_CLEAR_DIRTY_LOG`).
pub(crate) fn clear_dirty_log(
    vm: BorrowedFd<'_>,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    words: &[u64],
) -> nix::Result<()> {
    assert!(words.len() as u64 * 64 >= u64::from(num_pages));
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the descriptor is that of a VM. KVM reads `num_pages` bits, which `words` has
    // (asserted), and writes only the bits of the structure.
    unsafe { ioctl::clear_dirty_log(vm.as_raw_fd(), &raw mut clear) }.map(drop)
}

/// Linux include/uapi/linux/kvm.h.
mod ioctl {
    use super::{
        KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_enable_cap, kvm_userspace_memory_region,
    };

    // _IO(KVMIO, 0x03)
    nix::ioctl_write_int_bad!(check_extension, nix::request_code_none!(KVMIO, 0x03));
    // _IOW(KVMIO, 0x42, struct kvm_dirty_log)
    nix::ioctl_write_ptr!(get_dirty_log, KVMIO, 0x42, kvm_dirty_log);
    // _IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)
    nix::ioctl_write_ptr!(
        set_user_memory_region,
        KVMIO,
        0x46,
        kvm_userspace_memory_region
    );
    // _IOW(KVMIO, 0xa3, struct kvm_enable_cap)
    nix::ioctl_write_ptr!(enable_cap, KVMIO, 0xa3, kvm_enable_cap);
    // _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)
    nix::ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
}
