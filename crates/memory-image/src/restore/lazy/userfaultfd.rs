//! The kernel's userfaultfd: faults on missing pages, and what fills them.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use nix::errno::Errno;
use nix::libc;
use thiserror::Error;

/// The kernel's interface: Linux `include/uapi/linux/userfaultfd.h`.
mod abi {
    pub(super) const API: u64 = 0xaa;
    pub(super) const REGISTER_MODE_MISSING: u64 = 1;
    /// Bits of what a registered range offers.
    pub(super) const OFFERS_COPY: u64 = 1 << 0x03;
    pub(super) const OFFERS_ZEROPAGE: u64 = 1 << 0x04;
    pub(super) const OFFERS_POISON: u64 = 1 << 0x08;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    /// `struct uffd_msg`: the event in byte 0, a page fault's address in bytes 16..24.
    pub(super) const MESSAGE: usize = 32;

    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    pub(super) struct Register {
        pub(super) start: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) len: u64,
    }

    #[repr(C)]
    pub(super) struct Copy {
        pub(super) to: u64,
        pub(super) from: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) done: i64,
    }

    /// `struct uffdio_zeropage` and `struct uffdio_poison`.
    #[repr(C)]
    pub(super) struct Set {
        pub(super) start: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) done: i64,
    }

    nix::ioctl_write_int_bad!(new, nix::request_code_none!(0xaa, 0x00));
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_read!(wake, 0xaa, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, 0xaa, 0x04, Set);
    nix::ioctl_readwrite!(poison, 0xaa, 0x08, Set);
}

/// A descriptor that gets the faults on missing pages of the ranges registered with it, and fills these pages and no others.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    descriptor: File,
    page: u64,
}

impl Userfaultfd {
    /// For faults of this process in pages of `page` bytes, those that the kernel takes on behalf of a vCPU or a system call among them.
    pub(crate) fn open(page: u64) -> Result<Self, UserfaultfdError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags and no address.
        let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let descriptor = match Errno::result(opened) {
            // SAFETY: a new descriptor, which nobody else owns.
            Ok(descriptor) => unsafe { File::from_raw_fd(descriptor as i32) },
            Err(Errno::EPERM) => Self::from_device(flags)?,
            Err(Errno::ENOSYS) => return Err(UserfaultfdError::Missing),
            Err(errno) => return Err(UserfaultfdError::Open(errno.into())),
        };
        let mut api = abi::Api {
            api: abi::API,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: `Api` is laid out as the kernel's struct and outlives the call.
        let agreed = unsafe { abi::api(descriptor.as_raw_fd(), &raw mut api) };
        agreed.map_err(|errno| UserfaultfdError::Open(errno.into()))?;
        Ok(Self { descriptor, page })
    }

    /// The device stands for a permission that files have, where the call itself takes a privilege.
    fn from_device(flags: i32) -> Result<File, UserfaultfdError> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd");
        let device = device.map_err(UserfaultfdError::NotPermitted)?;
        // SAFETY: the request takes flags and returns a new descriptor, which nobody else owns.
        unsafe {
            let opened = abi::new(device.as_raw_fd(), flags);
            let opened = opened.map_err(|errno| UserfaultfdError::NotPermitted(errno.into()))?;
            Ok(File::from_raw_fd(opened))
        }
    }

    /// Has every access to a missing page of the range wait until the page is filled. Returns whether it can be poisoned instead.
    ///
    /// # Safety
    /// The range is mapped, and its missing pages are the caller's to fill.
    pub(crate) unsafe fn register(&self, start: u64, len: u64) -> Result<bool, UserfaultfdError> {
        let mut register = abi::Register {
            start,
            len,
            mode: abi::REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `Register` is laid out as the kernel's struct; the range is the caller's promise.
        let registered = unsafe { abi::register(self.descriptor.as_raw_fd(), &raw mut register) };
        registered.map_err(|errno| UserfaultfdError::Register {
            start,
            len,
            source: errno.into(),
        })?;
        let needed = abi::OFFERS_COPY | abi::OFFERS_ZEROPAGE;
        if register.ioctls & needed != needed {
            return Err(UserfaultfdError::HugePages { start, len });
        }
        Ok(register.ioctls & abi::OFFERS_POISON != 0)
    }

    /// Lets the missing pages of the range be what they would be otherwise, and wakes whoever waits.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut range = abi::Range { start, len };
        // SAFETY: `Range` is laid out as the kernel's struct; the call touches no memory.
        unsafe { abi::unregister(self.descriptor.as_raw_fd(), &raw mut range) }?;
        // The kernel (6.18) wakes before it locks the mapping, and since 6.7 faults hold the lock of a mapping only: who faults in between
        // would sleep for ever.
        self.wake(start, len)
    }

    /// The address of the page that the next fault is in, if any waits.
    pub(crate) fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; abi::MESSAGE];
        match (&self.descriptor).read(&mut message) {
            Ok(abi::MESSAGE) if message[0] == abi::EVENT_PAGEFAULT => {
                let [_, _, address, _] = message.as_chunks::<8>().0 else {
                    unreachable!("32 bytes are four words")
                };
                Ok(Some(u64::from_ne_bytes(*address) & !(self.page - 1)))
            }
            Ok(len) => {
                let event = message[0];
                Err(io::Error::other(format!("{len} bytes of event {event:#x}")))
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Fills the missing pages at `to` with `bytes`, whole pages, and wakes whoever waits for them. Pages that are there stay as they are.
    pub(crate) fn copy(&self, to: u64, bytes: &[u8]) -> nix::Result<()> {
        self.fill(to, bytes.len() as u64, |at, len| {
            let mut copy = abi::Copy {
                to: at,
                from: bytes[(at - to) as usize..].as_ptr() as u64,
                len,
                mode: 0,
                done: 0,
            };
            // SAFETY: `Copy` is laid out as the kernel's struct; it reads `len` bytes, which is what is left of `bytes`, and writes
            // only to missing pages of ranges registered with this descriptor.
            let answer = unsafe { abi::copy(self.descriptor.as_raw_fd(), &raw mut copy) };
            (answer, copy.done)
        })
    }

    /// Fills missing pages with zeros, which takes no memory, and wakes.
    pub(crate) fn zero(&self, start: u64, len: u64) -> nix::Result<()> {
        self.set(abi::zeropage, start, len)
    }

    /// Has every access to the missing pages end in `SIGBUS`, or in `EFAULT` for the kernel's own, and wakes.
    pub(crate) fn poison(&self, start: u64, len: u64) -> nix::Result<()> {
        self.set(abi::poison, start, len)
    }

    fn set(
        &self,
        request: unsafe fn(i32, *mut abi::Set) -> nix::Result<i32>,
        start: u64,
        len: u64,
    ) -> nix::Result<()> {
        self.fill(start, len, |start, len| {
            let mut set = abi::Set {
                start,
                len,
                mode: 0,
                done: 0,
            };
            // SAFETY: `Set` is laid out as the structs of both requests, which change only missing pages of ranges registered with
            // this descriptor.
            let answer = unsafe { request(self.descriptor.as_raw_fd(), &raw mut set) };
            (answer, set.done)
        })
    }

    /// Asks for the range as often as it takes: `request` answers for a part of it, with the bytes done.
    fn fill(
        &self,
        start: u64,
        len: u64,
        mut request: impl FnMut(u64, u64) -> (nix::Result<i32>, i64),
    ) -> nix::Result<()> {
        let (mut at, end) = (start, start + len);
        while at < end {
            match request(at, end - at) {
                (Ok(_), _) => break,
                // A part was done, or the address space is being changed (userfaultfd(2), ioctl_userfaultfd(2)): go on.
                (Err(Errno::EAGAIN), done) if done > 0 => at += done as u64,
                (Err(Errno::EAGAIN), _) => std::thread::yield_now(),
                // Somebody else filled the page first. Whoever fills wakes; who was taken for waiting looks again.
                (Err(Errno::EEXIST), _) => {
                    self.wake(at, self.page)?;
                    at += self.page;
                }
                (Err(errno), _) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Has whoever waits for a page of the range look again.
    pub(crate) fn wake(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut range = abi::Range { start, len };
        // SAFETY: `Range` is laid out as the kernel's struct; the call touches no memory.
        unsafe { abi::wake(self.descriptor.as_raw_fd(), &raw mut range) }.map(drop)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Why memory can't be filled as it is touched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserfaultfdError {
    /// The kernel was built without userfaultfd.
    #[error(
        "this kernel has no userfaultfd (CONFIG_USERFAULTFD): restore or map the chain instead"
    )]
    Missing,
    /// The process may not handle faults that the kernel takes, as on behalf of a vCPU.
    #[error(
        "userfaultfd is not permitted: let the process open /dev/userfaultfd (Linux 6.1), give it CAP_SYS_PTRACE, \
         or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel gives no descriptor for another reason.
    #[error("userfaultfd does not open")]
    Open(#[source] io::Error),
    /// The kernel does not take the memory.
    #[error(
        "{len:#x} bytes at {start:#x} can't be registered with userfaultfd: they must be whole pages of private anonymous \
         or shared memory, mapped writable, and registered with no other"
    )]
    Register {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Memory that can't be filled page by page.
    #[error(
        "{len:#x} bytes at {start:#x} are huge pages of hugetlbfs: give memory of the host's own page size"
    )]
    HugePages {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A thread could not be started, or panicked.
    #[error("no thread fills the memory")]
    Thread(#[source] io::Error),
    /// Faults can't be waited for any more; the memory was made inaccessible.
    #[error("faults can't be waited for any more: the memory was made inaccessible")]
    Wait(#[source] io::Error),
    /// A page could not be put into the memory.
    #[error(
        "no page can be put at offset {offset:#x} of the guest's RAM: was it unmapped, or is the host out of memory?"
    )]
    Fill {
        /// Where, in bytes from the start of the RAM.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use test_machine::Need;

    use super::*;

    #[test]
    fn a_fill_goes_on_after_the_part_that_was_done_and_where_none_was_asks_again() {
        if !Need::Userfaultfd
            .met("a_fill_goes_on_after_the_part_that_was_done_and_where_none_was_asks_again")
        {
            return;
        }
        let again = Errno::EAGAIN;
        let answers = [
            (Err(again), 4096),
            (Err(again), -i64::from(again as i32)),
            (Err(again), 0),
            (Ok(0), 3 * 4096),
        ];
        let start = 1 << 20;
        let mut asked = Vec::new();
        let fault = Userfaultfd::open(4096).unwrap();
        let filled = fault.fill(start, 4 * 4096, |at, len| {
            asked.push((at - start, len));
            answers[asked.len() - 1]
        });
        assert_eq!(filled, Ok(()));
        let rest = (4096, 3 * 4096);
        assert_eq!(asked, [(0, 4 * 4096), rest, rest, rest]);
    }
}
