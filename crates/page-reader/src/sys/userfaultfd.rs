//! Whether a missing page is for userfaultfd to fill. `/proc/self/smaps` says so too, but counts all pages of the process to say it: 14 to
//! 30 ms a GiB, against 0.1 ms here.
//!
//! `UFFDIO_COPY` fails with `ENOENT` where its destination is in no mapping that is registered, with whomever. In one that is, it would
//! next read its source, which can't be read: so it fails either way, and changes nothing. That a mapping that is
//! registered with somebody else counts is not written down, so it's tried out first: a kernel that doesn't tell isn't believed.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::page_size;

/// One that may be asked.
#[derive(Debug)]
pub(super) struct Userfaultfd {
    fault: OwnedFd,
    source: Unreadable,
}

impl Userfaultfd {
    /// `None` where the process may not have any, or the kernel doesn't tell.
    pub(super) fn that_tells() -> Option<Self> {
        let asked = Self {
            fault: open().ok()?,
            source: Unreadable::new().ok()?,
        };
        let address = asked.source.address();
        let other = open().ok()?;
        register(&other, address).ok()?;
        (!asked.leaves_alone(address)).then_some(asked)
    }

    /// Whether the mapping at `address`, of a page, is registered with no userfaultfd, of this process or another. Where nothing is
    /// mapped, none has it.
    pub(super) fn leaves_alone(&self, address: u64) -> bool {
        let mut copy = ioctl::Copy {
            to: address,
            from: self.source.address(),
            len: page_size(),
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes the structure, which is laid out as its own (asserted below). It writes nothing to
        // `to`, as `from` can't be read: `source` is mapped without any access while it lives.
        let copied = unsafe { ioctl::copy(self.fault.as_raw_fd(), &raw mut copy) };
        copied == Err(Errno::ENOENT)
    }
}

/// One that sees no faults of the kernel, as anybody may have it (Linux 5.11).
fn open() -> nix::Result<OwnedFd> {
    /// `UFFD_USER_MODE_ONLY`
    const USER_MODE_ONLY: libc::c_int = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the call takes flags only.
    let opened = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: a new descriptor, which nobody else has.
    let fault = unsafe { OwnedFd::from_raw_fd(opened as libc::c_int) };
    let mut api = ioctl::Api {
        api: ioctl::API,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes the structure, which is laid out as its own. No feature is asked for.
    unsafe { ioctl::api(fault.as_raw_fd(), &raw mut api) }?;
    Ok(fault)
}

fn register(fault: &OwnedFd, address: u64) -> nix::Result<()> {
    let mut register = ioctl::Register {
        start: address,
        len: page_size(),
        mode: ioctl::MISSING,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes the structure, which is laid out as its own. Nobody waits for the page that it's about: only
    // `Unreadable` is registered, which no access gets as far as to be missing.
    unsafe { ioctl::register(fault.as_raw_fd(), &raw mut register) }?;
    Ok(())
}

/// A page that may not be accessed.
#[derive(Debug)]
struct Unreadable(NonNull<libc::c_void>);

impl Unreadable {
    fn new() -> nix::Result<Self> {
        let none = ProtFlags::PROT_NONE;
        // SAFETY: a new mapping, where the kernel likes.
        unsafe { mmap_anonymous(None, len(), none, MapFlags::MAP_PRIVATE) }.map(Self)
    }

    fn address(&self) -> u64 {
        self.0.addr().get() as u64
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody was handed its address but the kernel.
        let unmapped = unsafe { munmap(self.0, len().get()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

fn len() -> NonZeroUsize {
    let size = usize::try_from(page_size()).ok();
    size.and_then(NonZeroUsize::new).expect("a page has a size")
}

/// From Linux `include/uapi/linux/userfaultfd.h`.
mod ioctl {
    pub(super) const API: u64 = 0xaa;
    /// `UFFDIO_REGISTER_MODE_MISSING`
    pub(super) const MISSING: u64 = 1;

    /// `struct uffdio_api`
    #[derive(Debug, Default)]
    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_register`
    #[derive(Debug, Default)]
    #[repr(C)]
    pub(super) struct Register {
        pub(super) start: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_copy`
    #[derive(Debug, Default)]
    #[repr(C)]
    pub(super) struct Copy {
        pub(super) to: u64,
        pub(super) from: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) copied: i64,
    }

    const _: () =
        assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Copy>() == 40);

    // _IOWR(UFFDIO, _UFFDIO_..., struct uffdio_...)
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::AddressSpace;
    use std::sync::Mutex;
    use test_machine::Need;

    /// One test at a time: the kernel joins two pages of which neither is registered, and registers them as one.
    static TURN: Mutex<()> = Mutex::new(());

    /// `struct uffdio_range`
    #[repr(C)]
    struct Range {
        start: u64,
        len: u64,
    }

    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);

    fn asked(test: &str) -> Option<Userfaultfd> {
        let asked = Userfaultfd::that_tells();
        assert!(
            asked.is_some() || !Need::Userfaultfd.met(test),
            "there is one, and it tells nothing"
        );
        asked
    }

    #[test]
    fn what_another_has_is_told_from_what_nobody_has() {
        let _turn = TURN.lock();
        let Some(asked) = asked("what_another_has_is_told_from_what_nobody_has") else {
            return;
        };
        let page = Unreadable::new().unwrap();
        assert!(asked.leaves_alone(page.address()));
        let other = open().unwrap();
        register(&other, page.address()).unwrap();
        assert!(!asked.leaves_alone(page.address()));
        // By more than closing: a child that another test has just forked may have the descriptor too.
        let mut range = Range {
            start: page.address(),
            len: page_size(),
        };
        // SAFETY: the kernel reads the structure, which is laid out as its own.
        unsafe { unregister(other.as_raw_fd(), &raw mut range) }.unwrap();
        assert!(asked.leaves_alone(page.address()));
    }

    #[test]
    fn smaps_is_read_only_where_userfaultfd_has_what_is_asked_for() {
        let name = "smaps_is_read_only_where_userfaultfd_has_what_is_asked_for";
        let _turn = TURN.lock();
        if asked(name).is_none() {
            return;
        }
        let (free, taken) = (Unreadable::new().unwrap(), Unreadable::new().unwrap());
        let other = open().unwrap();
        register(&other, taken.address()).unwrap();
        let space = AddressSpace::of_this_process();
        let populated = |page: &Unreadable| {
            let range = page.address()..page.address() + page_size();
            space.populated(range).count()
        };
        assert_eq!(populated(&free), 0);
        assert!(space.thorough.get().is_none());
        assert_eq!(populated(&taken), 1);
        assert!(space.thorough.get().is_some());
        assert_eq!(populated(&free), 0);
    }
}
