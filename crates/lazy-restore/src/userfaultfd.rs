//! The kernel's userfaultfd: receives faults on missing pages and fills these.

#![allow(unsafe_code)]

mod error;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use uffd::{Event, Features, FillFlags, Modes, OpenError, Operations, Stop};

pub use error::UserfaultfdError;

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
    /// The reason why the request stopped early. [`Errno::EAGAIN`]: a message other than a fault is
    /// unread, or its cause is still in progress. [`Errno::EEXIST`]: the next page is not missing.
    /// [`Errno::ENOENT`]: the next page is not registered.
    pub(crate) stop: Option<Errno>,
}

/// A userfaultfd descriptor. It receives the faults on missing pages of the ranges registered with
/// it, and fills only these pages.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fault: uffd::Userfaultfd,
    page: u64,
    /// A page of zeros, if the kernel has none for memory of this kind (hugetlbfs).
    zeros: Option<Box<[u8]>>,
}

impl Userfaultfd {
    /// Opens a descriptor for faults of this process in pages of `page` bytes, including faults
    /// that the kernel takes on behalf of a vCPU or a system call. Uses the descriptor that was
    /// `passed`, if there is one.
    pub(crate) fn open(page: u64, passed: Option<&OwnedFd>) -> Result<Self, UserfaultfdError> {
        // Without these features, memory that is moved loses its registration, and its missing
        // pages are zeros. Discarded pages could not be distinguished from missing ones.
        let features = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
        let options = uffd::Userfaultfd::options().features(features);
        if let Some(passed) = passed {
            let passed = passed.try_clone().map_err(UserfaultfdError::Open)?;
            let fault = options.adopt(passed).map_err(UserfaultfdError::Passed)?;
            return Ok(Self::new(fault, page));
        }
        let fault = options.open();
        let fault = fault.map_err(|error| match error {
            OpenError::Unsupported => UserfaultfdError::Missing,
            OpenError::NotPermitted { device, .. } => UserfaultfdError::NotPermitted(device),
            OpenError::Open(source) => UserfaultfdError::Open(source),
            other => UserfaultfdError::Open(io::Error::other(other)),
        })?;
        Ok(Self::new(fault, page))
    }

    fn new(fault: uffd::Userfaultfd, page: u64) -> Self {
        Self {
            fault,
            page,
            zeros: None,
        }
    }

    /// Uses the descriptor of another process for its pages of `page` bytes, which consist of
    /// `huge` pages of hugetlbfs or not.
    pub(crate) fn of_peer(fault: uffd::Userfaultfd, page: u64, huge: bool) -> Self {
        Self {
            zeros: huge.then(|| vec![0; page as usize].into()),
            ..Self::new(fault, page)
        }
    }

    /// Registers a range, so that every access to a missing page waits until the page is filled.
    /// Returns whether missing pages can be poisoned instead.
    ///
    /// # Safety
    /// The range must be mapped, and only the caller may fill its missing pages.
    pub(crate) unsafe fn register(&self, start: u64, len: u64) -> Result<bool, UserfaultfdError> {
        // SAFETY: the contract is the same.
        let registered = unsafe { self.fault.register(range(start, len), Modes::MISSING) };
        let operations = registered.map_err(|error| UserfaultfdError::Register {
            start,
            len,
            source: error.source,
        })?;
        if !operations.contains(Operations::COPY | Operations::ZEROPAGE) {
            return Err(UserfaultfdError::HugePages { start, len });
        }
        Ok(operations.contains(Operations::POISON))
    }

    /// Unregisters a range, after which missing pages are zeros, and wakes waiting accesses.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> nix::Result<()> {
        errno(self.fault.unregister(range(start, len)))
    }

    /// Returns the next message, if there is one. Faults come before other messages, regardless of
    /// the order of events.
    pub(crate) fn next_message(&self) -> io::Result<Option<Message>> {
        Ok(match self.fault.read_event()? {
            None => None,
            Some(Event::PageFault { address, .. }) => {
                Some(Message::Fault(address & !(self.page - 1)))
            }
            Some(Event::Remove { range }) => Some(Message::Removed(range)),
            Some(Event::Unmap { range }) => Some(Message::Unmapped(range)),
            Some(Event::Remap { from, to }) => Some(Message::Moved { from, to }),
            Some(other) => return Err(io::Error::other(format!("unexpected event {other:?}"))),
        })
    }

    /// Returns whether the cause of a message other than a fault is still in progress: a thread in
    /// `madvise`, `munmap` or `mremap` waits for its message to be read, or was just woken.
    ///
    /// After a range is unregistered, no further message is about it. After this call has returned
    /// `false`, no such message is pending.
    pub(crate) fn is_changing(&self) -> bool {
        self.fault.is_changing()
    }

    /// Fills the missing pages at `to` with `bytes`, whole pages, and wakes the accesses that wait
    /// for them.
    pub(crate) fn copy(&self, to: u64, bytes: &[u8]) -> Filled {
        fill(self.page, bytes.len() as u64, |done, len| {
            let bytes = &bytes[done as usize..][..len as usize];
            self.fault.copy_bytes(to + done, bytes, FillFlags::empty())
        })
    }

    /// Fills missing pages with zeros, and wakes waiting accesses. Ordinary pages take no memory.
    pub(crate) fn zero(&self, start: u64, len: u64) -> Filled {
        if let Some(zeros) = &self.zeros {
            return fill(self.page, len, |done, _| {
                let copied = self
                    .fault
                    .copy_bytes(start + done, zeros, FillFlags::empty());
                let rest = len - done - copied.bytes;
                match copied.stop {
                    None if rest > 0 => uffd::Filled {
                        stop: Some(Stop::Partial),
                        ..copied
                    },
                    _ => copied,
                }
            });
        }
        fill(self.page, len, |done, len| {
            let pages = rest(start, done, len);
            self.fault.zeropage(pages, FillFlags::empty())
        })
    }

    /// Poisons missing pages and wakes waiting accesses. An access then gets `SIGBUS`, or `EFAULT`
    /// if the kernel makes it.
    pub(crate) fn poison(&self, start: u64, len: u64) -> Filled {
        fill(self.page, len, |done, len| {
            let pages = rest(start, done, len);
            self.fault.poison(pages, FillFlags::empty())
        })
    }

    /// Keeps the userfaultfd open until the process ends: missing pages would become zeros once it
    /// is closed.
    pub(crate) fn leave_open(&self) -> io::Result<()> {
        self.fault.try_clone().map(std::mem::forget)
    }

    /// Wakes accesses that wait for a page of the range. They fault again if the page is missing.
    pub(crate) fn wake(&self, start: u64, len: u64) -> nix::Result<()> {
        errno(self.fault.wake(range(start, len)))
    }
}

fn range(start: u64, len: u64) -> Range<u64> {
    start..start.saturating_add(len)
}

/// Returns the `len` bytes after the first `done` ones from `start` on.
fn rest(start: u64, done: u64, len: u64) -> Range<u64> {
    range(start + done, len)
}

fn errno(result: io::Result<()>) -> nix::Result<()> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
}

/// Repeats `request` after partial results. It gets the bytes done so far and the bytes to do,
/// whole pages, and returns the bytes that it did.
///
/// A request must not cross the end of one of the kernel's mappings. Memory that one call has
/// mapped can consist of several: `madvise`, `mlock2`, `mprotect`, `mbind` and other calls split a
/// mapping where a part of it becomes different. For a request across mappings the kernel fills
/// nothing and returns ENOENT, as for memory that is not registered. A refused range is therefore
/// halved, down to one page.
fn fill(page: u64, len: u64, mut request: impl FnMut(u64, u64) -> uffd::Filled) -> Filled {
    let (mut bytes, mut step) = (0, len);
    while bytes < len {
        let asked = step.min(len - bytes);
        let filled = request(bytes, asked);
        bytes += filled.bytes;
        match filled.stop {
            None => step = len.min(2 * asked),
            Some(Stop::NotRegistered) if asked > page => {
                step = (asked / 2).next_multiple_of(page);
            }
            // The next request returns the reason for stopping.
            Some(Stop::Partial) => {}
            Some(stop) => {
                let stop = Some(Errno::from_raw(stop.raw_os_error()));
                return Filled { bytes, stop };
            }
        }
    }
    Filled { bytes, stop: None }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn stopped(bytes: u64, stop: Stop) -> uffd::Filled {
        let stop = Some(stop);
        uffd::Filled { bytes, stop }
    }

    /// Requests four pages, of which the first request fills one.
    #[rstest]
    #[case::all(None, 4, None)]
    #[case::changing(Some(Stop::Changing), 1, Some(Errno::EAGAIN))]
    #[case::occupied(Some(Stop::Present), 1, Some(Errno::EEXIST))]
    fn fill_continues_after_a_partial_result(
        #[case] second: Option<Stop>,
        #[case] pages: u64,
        #[case] stop: Option<Errno>,
    ) {
        let mut asked = Vec::new();
        let filled = fill(4096, 4 * 4096, |at, len| {
            asked.push((at, len));
            match (at, second) {
                (0, _) => stopped(4096, Stop::Partial),
                (_, Some(stop)) => stopped(0, stop),
                (_, None) => uffd::Filled {
                    bytes: len,
                    stop: None,
                },
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
                return stopped(0, Stop::NotRegistered);
            }
            filled_pages.extend(pages);
            uffd::Filled {
                bytes: len,
                stop: None,
            }
        });
        let pages = missing.unwrap_or(11);
        let (bytes, stop) = (pages * 4096, missing.map(|_| Errno::ENOENT));
        assert_eq!(filled, Filled { bytes, stop });
        assert!(filled_pages.into_iter().eq(0..pages));
        assert!(requests <= 3 * 11, "{requests} requests");
    }
}
