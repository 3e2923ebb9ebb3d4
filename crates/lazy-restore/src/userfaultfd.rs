//! The kernel's userfaultfd: receives faults on missing pages and fills these.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use nix::errno::Errno;
use nix::libc;
use page_reader::MappingsError;
use thiserror::Error;

/// The kernel's interface: Linux `include/uapi/linux/userfaultfd.h`.
mod abi {
    pub(super) const API: u64 = 0xaa;
    pub(super) const REGISTER_MODE_MISSING: u64 = 1;
    /// Bits of the operations that a registered range supports.
    pub(super) const OFFERS_COPY: u64 = 1 << 0x03;
    pub(super) const OFFERS_ZEROPAGE: u64 = 1 << 0x04;
    pub(super) const OFFERS_POISON: u64 = 1 << 0x08;
    pub(super) const FEATURE_EVENT_REMAP: u64 = 1 << 2;
    pub(super) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
    pub(super) const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    pub(super) const EVENT_REMAP: u8 = 0x14;
    pub(super) const EVENT_REMOVE: u8 = 0x15;
    pub(super) const EVENT_UNMAP: u8 = 0x16;
    /// `struct uffd_msg`: the event in byte 0, its arguments from byte 8 on. The arguments of a
    /// page fault are flags and an address; of a removal or unmapping, a start and an end; of a
    /// move, the old start, the new start and the length.
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

/// A message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// `madvise` discards the pages at these addresses: `MADV_DONTNEED`, `MADV_FREE` or
    /// `MADV_REMOVE`.
    Removed(Range<u64>),
    /// `munmap`, or a mapping over them, has removed these addresses.
    Unmapped(Range<u64>),
    /// `mremap` has moved the pages at these addresses to the address `to`.
    Moved { from: Range<u64>, to: u64 },
}

/// The result of a request to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filled {
    /// Bytes that were filled, and whose waiting accesses were woken.
    pub(crate) bytes: u64,
    /// Why the request stopped early. [`Errno::EAGAIN`]: a message other than a fault is unread, or
    /// its cause is still in progress. [`Errno::EEXIST`]: the next page is not missing.
    /// [`Errno::ENOENT`]: the next page is not registered.
    pub(crate) stop: Option<Errno>,
}

/// A userfaultfd descriptor. It receives the faults on missing pages of the ranges registered with
/// it, and fills only these pages.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    descriptor: File,
    page: u64,
}

impl Userfaultfd {
    /// Opens a descriptor for faults of this process in pages of `page` bytes, including faults
    /// that the kernel takes on behalf of a vCPU or a system call.
    pub(crate) fn open(page: u64) -> Result<Self, UserfaultfdError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags and no address.
        let opened = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let descriptor = match Errno::result(opened) {
            // SAFETY: a new descriptor, which nothing else owns.
            Ok(descriptor) => unsafe { File::from_raw_fd(descriptor as i32) },
            Err(Errno::EPERM) => Self::from_device(flags)?,
            Err(Errno::ENOSYS) => return Err(UserfaultfdError::Missing),
            Err(errno) => return Err(UserfaultfdError::Open(errno.into())),
        };
        let mut api = abi::Api {
            api: abi::API,
            // Without these features, memory that is moved loses its registration, and its missing
            // pages are zeros. Discarded pages could not be distinguished from missing ones.
            features: abi::FEATURE_EVENT_REMAP
                | abi::FEATURE_EVENT_REMOVE
                | abi::FEATURE_EVENT_UNMAP,
            ioctls: 0,
        };
        // SAFETY: `Api` has the layout of the kernel's struct and outlives the call.
        let agreed = unsafe { abi::api(descriptor.as_raw_fd(), &raw mut api) };
        agreed.map_err(|errno| UserfaultfdError::Open(errno.into()))?;
        Ok(Self { descriptor, page })
    }

    /// Opens the device, which requires file permissions, where the system call requires a
    /// privilege.
    fn from_device(flags: i32) -> Result<File, UserfaultfdError> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd");
        let device = device.map_err(UserfaultfdError::NotPermitted)?;
        // SAFETY: the request takes flags and returns a new descriptor, which nothing else owns.
        unsafe {
            let opened = abi::new(device.as_raw_fd(), flags);
            let opened = opened.map_err(|errno| UserfaultfdError::NotPermitted(errno.into()))?;
            Ok(File::from_raw_fd(opened))
        }
    }

    /// Registers a range, so that every access to a missing page waits until the page is filled.
    /// Returns whether missing pages can be poisoned instead.
    ///
    /// # Safety
    /// The range must be mapped, and only the caller may fill its missing pages.
    pub(crate) unsafe fn register(&self, start: u64, len: u64) -> Result<bool, UserfaultfdError> {
        let mut register = abi::Register {
            start,
            len,
            mode: abi::REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `Register` has the layout of the kernel's struct. The caller vouches for the
        // range.
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

    /// Unregisters a range, after which missing pages are zeros, and wakes waiting accesses.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut range = abi::Range { start, len };
        // SAFETY: `Range` has the layout of the kernel's struct; the call touches no memory.
        unsafe { abi::unregister(self.descriptor.as_raw_fd(), &raw mut range) }?;
        // The kernel (6.18) wakes before it locks the mapping. Since 6.7 a fault holds only the
        // lock of its mapping, so a thread that faults in between would sleep forever without this
        // call.
        self.wake(start, len)
    }

    /// Returns the next message, if there is one. Faults come before other messages, regardless of
    /// the order of events.
    pub(crate) fn next_message(&self) -> io::Result<Option<Message>> {
        let mut message = [0; abi::MESSAGE];
        match (&self.descriptor).read(&mut message) {
            Ok(abi::MESSAGE) => {
                let [event, first, second, third] = message.as_chunks::<8>().0 else {
                    unreachable!("32 bytes are four words")
                };
                let [first, second, third] =
                    [first, second, third].map(|word| u64::from_ne_bytes(*word));
                match event[0] {
                    abi::EVENT_PAGEFAULT => Ok(Some(Message::Fault(second & !(self.page - 1)))),
                    abi::EVENT_REMOVE => Ok(Some(Message::Removed(first..second))),
                    abi::EVENT_UNMAP => Ok(Some(Message::Unmapped(first..second))),
                    abi::EVENT_REMAP => Ok(Some(Message::Moved {
                        from: first..first.saturating_add(third),
                        to: second,
                    })),
                    event => Err(io::Error::other(format!("unknown event {event:#x}"))),
                }
            }
            Ok(len) => Err(io::Error::other(format!("a message of {len} bytes"))),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Returns whether the cause of a message other than a fault is still in progress: a thread in
    /// `madvise`, `munmap` or `mremap` waits for its message to be read, or was just woken.
    ///
    /// After a range is unregistered, no further message is about it. After this call has returned
    /// `false`, no such message is pending.
    pub(crate) fn is_changing(&self) -> bool {
        let mut nothing = abi::Set {
            start: 0,
            len: 0,
            mode: 0,
            done: 0,
        };
        // SAFETY: `Set` has the layout of the kernel's struct. An empty range is invalid, so
        // nothing is filled. The kernel returns EAGAIN before it checks the range.
        let answer = unsafe { abi::zeropage(self.descriptor.as_raw_fd(), &raw mut nothing) };
        answer == Err(Errno::EAGAIN)
    }

    /// Fills the missing pages at `to` with `bytes`, whole pages, and wakes the accesses that wait
    /// for them.
    pub(crate) fn copy(&self, to: u64, bytes: &[u8]) -> Filled {
        fill(self.page, bytes.len() as u64, |done, len| {
            let mut copy = abi::Copy {
                to: to + done,
                from: bytes[done as usize..][..len as usize].as_ptr() as u64,
                len,
                mode: 0,
                done: 0,
            };
            // SAFETY: `Copy` has the layout of the kernel's struct. The kernel reads `len` bytes of
            // `bytes`, as sliced above, and writes only to missing pages of ranges registered with
            // this descriptor.
            let answer = unsafe { abi::copy(self.descriptor.as_raw_fd(), &raw mut copy) };
            (answer, copy.done)
        })
    }

    /// Fills missing pages with zeros, which takes no memory, and wakes waiting accesses.
    pub(crate) fn zero(&self, start: u64, len: u64) -> Filled {
        self.set(abi::zeropage, start, len)
    }

    /// Poisons missing pages and wakes waiting accesses. An access then gets `SIGBUS`, or `EFAULT`
    /// if the kernel makes it.
    pub(crate) fn poison(&self, start: u64, len: u64) -> Filled {
        self.set(abi::poison, start, len)
    }

    fn set(
        &self,
        request: unsafe fn(i32, *mut abi::Set) -> nix::Result<i32>,
        start: u64,
        len: u64,
    ) -> Filled {
        fill(self.page, len, |done, len| {
            let mut set = abi::Set {
                start: start + done,
                len,
                mode: 0,
                done: 0,
            };
            // SAFETY: `Set` has the layout of the structs of both requests, which change only
            // missing pages of ranges registered with this descriptor.
            let answer = unsafe { request(self.descriptor.as_raw_fd(), &raw mut set) };
            (answer, set.done)
        })
    }

    /// Keeps the userfaultfd open until the process ends: missing pages would become zeros once it
    /// is closed.
    pub(crate) fn leave_open(&self) -> io::Result<()> {
        self.descriptor.try_clone().map(std::mem::forget)
    }

    /// Wakes accesses that wait for a page of the range. They fault again if the page is missing.
    pub(crate) fn wake(&self, start: u64, len: u64) -> nix::Result<()> {
        let mut range = abi::Range { start, len };
        // SAFETY: `Range` has the layout of the kernel's struct; the call touches no memory.
        unsafe { abi::wake(self.descriptor.as_raw_fd(), &raw mut range) }.map(drop)
    }
}

/// Repeats `request` after partial results. It gets the bytes done so far and the bytes to do,
/// whole pages, and returns the bytes that it did.
///
/// A request must not cross the end of one of the kernel's mappings. Memory that one call has
/// mapped can consist of several: `madvise`, `mlock2`, `mprotect`, `mbind` and other calls split a
/// mapping where a part of it becomes different. For a request across mappings the kernel fills
/// nothing and returns ENOENT, as for memory that is not registered. A refused range is therefore
/// halved, down to one page.
fn fill(
    page: u64,
    len: u64,
    mut request: impl FnMut(u64, u64) -> (nix::Result<i32>, i64),
) -> Filled {
    let (mut bytes, mut step) = (0, len);
    while bytes < len {
        let asked = step.min(len - bytes);
        match request(bytes, asked) {
            (Ok(_), _) => {
                bytes += asked;
                step = len.min(2 * asked);
            }
            (Err(Errno::ENOENT), _) if asked > page => step = (asked / 2).next_multiple_of(page),
            // A part was done. The next request returns the reason for stopping
            // (ioctl_userfaultfd(2)).
            (Err(Errno::EAGAIN), done) if done > 0 => bytes += done as u64,
            (Err(stop), _) => {
                let stop = Some(stop);
                return Filled { bytes, stop };
            }
        }
    }
    Filled { bytes, stop: None }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Errors of filling memory on demand.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserfaultfdError {
    /// The kernel was built without userfaultfd.
    #[error(
        "this kernel has no userfaultfd (CONFIG_USERFAULTFD): restore or map the chain instead"
    )]
    Missing,
    /// The process is not permitted to handle faults that the kernel takes, such as on behalf of a
    /// vCPU.
    #[error(
        "userfaultfd is not permitted: let the process open /dev/userfaultfd (Linux 6.1), \
         give it CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel returned no descriptor for another reason.
    #[error("failed to open userfaultfd")]
    Open(#[source] io::Error),
    /// The kernel refused to register the memory.
    #[error(
        "{len:#x} bytes at {start:#x} cannot be registered with userfaultfd: give whole pages of \
         private anonymous memory that is mapped writable and registered with no other userfaultfd"
    )]
    Register {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The memory consists of huge pages, which cannot be filled page by page.
    #[error(
        "{len:#x} bytes at {start:#x} are huge pages of hugetlbfs: \
         give memory of the host's own page size"
    )]
    HugePages {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Other users may share the memory: they would find zeros in pages that are still missing.
    #[error(
        "{len:#x} bytes at {start:#x} are not private anonymous memory ({mapping}), and its other \
         users would find zeros in missing pages: restore the chain into it before anything else uses it \
         (Chain::restore)"
    )]
    Shared {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The mapping that is shared or of a file, as listed in `/proc/self/smaps`.
        mapping: String,
    },
    /// The check that the memory is private failed.
    #[error("failed to check that the memory is private: mount /proc")]
    Unchecked(#[source] MappingsError),
    /// The memory cannot be discarded, or cannot be excluded from forked children.
    #[error("failed to prepare {len:#x} bytes at {start:#x}: {what}")]
    Prepare {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// What failed.
        what: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Something other than this restore put a page into the memory.
    #[error(
        "the page at offset {offset:#x} of the guest's RAM was filled by something else, and was \
         made inaccessible: do not write to the memory until the restore has finished"
    )]
    Occupied {
        /// Where, in bytes from the start of the RAM.
        offset: u64,
    },
    /// Memory was unmapped or moved while it was being filled.
    #[error(
        "{len:#x} bytes at offset {offset:#x} of the guest's RAM were unmapped or moved: keep the \
         memory mapped until the restore has finished"
    )]
    Unmapped {
        /// Where, in bytes from the start of the RAM.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// A thread could not be started, or panicked.
    #[error("failed to run a thread that fills the memory")]
    Thread(#[source] io::Error),
    /// Faults can no longer be received. The memory was made inaccessible.
    #[error("failed to receive faults: the memory was made inaccessible")]
    Wait(#[source] io::Error),
    /// A page could not be put into the memory.
    #[error(
        "failed to fill the page at offset {offset:#x} of the guest's RAM: check that the memory \
         is mapped and that the host has free memory"
    )]
    Fill {
        /// Where, in bytes from the start of the RAM.
        offset: u64,
        /// The error of the operating system.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const AGAIN: Errno = Errno::EAGAIN;

    /// Requests four pages, of which the first request fills one.
    #[rstest]
    #[case::all(Ok(0), 0, 4, None)]
    #[case::changing(Err(AGAIN), -i64::from(AGAIN as i32), 1, Some(AGAIN))]
    #[case::changing_in_older_kernels(Err(AGAIN), 0, 1, Some(AGAIN))]
    #[case::occupied(Err(Errno::EEXIST), -i64::from(Errno::EEXIST as i32), 1, Some(Errno::EEXIST))]
    fn fill_continues_after_a_partial_result(
        #[case] answer: nix::Result<i32>,
        #[case] done: i64,
        #[case] pages: u64,
        #[case] stop: Option<Errno>,
    ) {
        let mut asked = Vec::new();
        let filled = fill(4096, 4 * 4096, |at, len| {
            asked.push((at, len));
            match at {
                0 => (Err(AGAIN), 4096),
                _ => (answer, done),
            }
        });
        let bytes = pages * 4096;
        assert_eq!(filled, Filled { bytes, stop });
        assert_eq!(asked, [(0, 4 * 4096), (4096, 3 * 4096)]);
    }

    /// Requests eleven pages in several mappings, or with a page that is not registered.
    #[rstest]
    #[case::one_mapping(&[11], None)]
    #[case::two_mappings(&[5, 6], None)]
    #[case::a_page_of_its_own(&[5, 1, 5], None)]
    #[case::every_page_of_its_own(&[1; 11], None)]
    #[case::the_first_is_missing(&[0, 11], Some(0))]
    #[case::one_is_missing(&[7, 0, 4], Some(7))]
    fn fill_requests_end_at_the_end_of_a_mapping(
        #[case] mappings: &[u64],
        #[case] missing: Option<u64>,
    ) {
        let mut requests = 0;
        let mut filled_pages = Vec::new();
        let filled = fill(4096, 11 * 4096, |at, len| {
            requests += 1;
            let pages = at / 4096..(at + len) / 4096;
            let mut start = 0;
            let fits = mappings.iter().any(|len| {
                start += len;
                start - len <= pages.start && pages.end <= start
            });
            let absent = missing.is_some_and(|page| pages.contains(&page));
            if !fits || absent {
                return (Err(Errno::ENOENT), -i64::from(Errno::ENOENT as i32));
            }
            filled_pages.extend(pages);
            (Ok(0), len as i64)
        });
        let pages = missing.unwrap_or(11);
        let (bytes, stop) = (pages * 4096, missing.map(|_| Errno::ENOENT));
        assert_eq!(filled, Filled { bytes, stop });
        assert!(filled_pages.into_iter().eq(0..pages));
        assert!(requests <= 3 * 11, "{requests} requests");
    }
}
