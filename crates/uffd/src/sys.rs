//! System calls and ioctls of userfaultfd.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    __NR_userfaultfd, uffdio_api, uffdio_continue, uffdio_copy, uffdio_move, uffdio_poison,
    uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use nix::errno::Errno;
use nix::libc;

mod request {
    #![allow(missing_docs, reason = "nix's macros make documented functions")]

    use super::*;
    use crate::abi::*;

    nix::ioctl_write_int_bad!(
        new,
        nix::request_code_none!(USERFAULTFD_IOC, IOC_NEW_NUMBER)
    );
    nix::ioctl_readwrite!(api, UFFDIO, _UFFDIO_API, uffdio_api);
    nix::ioctl_readwrite!(register, UFFDIO, _UFFDIO_REGISTER, uffdio_register);
    nix::ioctl_read!(unregister, UFFDIO, _UFFDIO_UNREGISTER, uffdio_range);
    nix::ioctl_read!(wake, UFFDIO, _UFFDIO_WAKE, uffdio_range);
    nix::ioctl_readwrite!(copy, UFFDIO, _UFFDIO_COPY, uffdio_copy);
    nix::ioctl_readwrite!(zeropage, UFFDIO, _UFFDIO_ZEROPAGE, uffdio_zeropage);
    nix::ioctl_readwrite!(
        write_protect,
        UFFDIO,
        _UFFDIO_WRITEPROTECT,
        uffdio_writeprotect
    );
    nix::ioctl_readwrite!(continue_, UFFDIO, _UFFDIO_CONTINUE, uffdio_continue);
    nix::ioctl_readwrite!(poison, UFFDIO, _UFFDIO_POISON, uffdio_poison);
    nix::ioctl_readwrite!(move_, UFFDIO, _UFFDIO_MOVE, uffdio_move);
}

/// Opens a userfaultfd by `userfaultfd(2)`.
pub(crate) fn open(flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes flags and no address.
    let opened = unsafe { libc::syscall(__NR_userfaultfd as libc::c_long, flags) };
    // SAFETY: a new descriptor, which has no other owner.
    Errno::result(opened).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Opens a userfaultfd by `/dev/userfaultfd`, which is `device`.
pub(crate) fn open_by_device(device: impl AsFd, flags: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the request takes flags and no address.
    let opened = unsafe { request::new(device.as_fd().as_raw_fd(), flags) };
    // SAFETY: a new descriptor, which has no other owner.
    opened.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the descriptor that the kernel installed for a fork event.
///
/// # Safety
/// The number must come from a fork event that was just read, and be taken once.
pub(crate) unsafe fn take_forked(descriptor: u32) -> OwnedFd {
    // SAFETY: the kernel opened the descriptor for the reader of the event, by the contract.
    unsafe { OwnedFd::from_raw_fd(descriptor.cast_signed()) }
}

pub(crate) fn api(fault: &OwnedFd, api: &mut uffdio_api) -> nix::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which has its layout. The features change
    // what the kernel reports, and no memory.
    unsafe { request::api(fault.as_raw_fd(), api) }.map(drop)
}

/// Registers a range.
///
/// # Safety
/// As for [`Userfaultfd::register`](crate::Userfaultfd::register).
pub(crate) unsafe fn register(fault: &OwnedFd, register: &mut uffdio_register) -> nix::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which has its layout. The caller vouches
    // for the range.
    unsafe { request::register(fault.as_raw_fd(), register) }.map(drop)
}

pub(crate) fn unregister(fault: &OwnedFd, mut range: uffdio_range) -> nix::Result<()> {
    // SAFETY: the kernel reads the structure, which has its layout, and changes no page.
    unsafe { request::unregister(fault.as_raw_fd(), &raw mut range) }.map(drop)
}

pub(crate) fn wake(fault: &OwnedFd, mut range: uffdio_range) -> nix::Result<()> {
    // SAFETY: the kernel reads the structure, which has its layout, and accesses no memory of the
    // range.
    unsafe { request::wake(fault.as_raw_fd(), &raw mut range) }.map(drop)
}

/// Fills missing pages with bytes.
///
/// # Safety
/// As for [`Userfaultfd::copy`](crate::Userfaultfd::copy).
pub(crate) unsafe fn copy(fault: &OwnedFd, copy: &mut uffdio_copy) -> nix::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which has its layout. The caller vouches
    // for the source. The kernel writes only to missing pages of registered ranges, for which the
    // caller of `register` vouches.
    unsafe { request::copy(fault.as_raw_fd(), copy) }.map(drop)
}

pub(crate) fn zeropage(fault: &OwnedFd, zeropage: &mut uffdio_zeropage) -> nix::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which has its layout. It changes only
    // missing pages of registered ranges, for which the caller of `register` vouches.
    unsafe { request::zeropage(fault.as_raw_fd(), zeropage) }.map(drop)
}

pub(crate) fn continue_(fault: &OwnedFd, continue_: &mut uffdio_continue) -> nix::Result<()> {
    // SAFETY: as for `zeropage`. The pages are those of the mapped file.
    unsafe { request::continue_(fault.as_raw_fd(), continue_) }.map(drop)
}

pub(crate) fn poison(fault: &OwnedFd, poison: &mut uffdio_poison) -> nix::Result<()> {
    // SAFETY: as for `zeropage`. An access to a poisoned page ends the thread by a signal.
    unsafe { request::poison(fault.as_raw_fd(), poison) }.map(drop)
}

pub(crate) fn write_protect(fault: &OwnedFd, mut protect: uffdio_writeprotect) -> nix::Result<()> {
    // SAFETY: the kernel reads the structure, which has its layout. It changes which writes wait,
    // and no content.
    unsafe { request::write_protect(fault.as_raw_fd(), &raw mut protect) }.map(drop)
}

/// Moves pages.
///
/// # Safety
/// As for [`Userfaultfd::move_`](crate::Userfaultfd::move_).
pub(crate) unsafe fn move_(fault: &OwnedFd, move_: &mut uffdio_move) -> nix::Result<()> {
    // SAFETY: the kernel reads and writes the structure, which has its layout. The caller vouches
    // for the source; the destination is as for `copy`.
    unsafe { request::move_(fault.as_raw_fd(), move_) }.map(drop)
}
