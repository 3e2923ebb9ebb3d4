//! The pages of the memory: filled from the images, made zeros, or made inaccessible.
//!
//! The page fault handler and the prefetcher fill pages through this type. A page is filled only
//! under the lock of the ledger, which also covers the messages about discarded, unmapped and moved
//! memory.

mod load;
mod messages;
mod poison;
mod remote;
mod teardown;

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::counters::Counters;
use crate::error::LazyError;
use crate::ledger::{Ledger, LedgerLock, Role};
use crate::page_bits::PageBits;
use crate::pause::Pause;
use crate::ram_source::RamSource;
use crate::regions::Regions;
use crate::status::Status;
use crate::target::Target;
use crate::userfaultfd::{Filled, Userfaultfd, UserfaultfdError};

/// Bytes that are filled at a time, or one page, so that a fault need not wait for a whole piece.
const STEP: u64 = 64 << 10;

/// The memory to fill, the source that it is filled from, and the state of its pages.
pub(crate) struct Pages {
    source: Box<dyn RamSource>,
    target: Target,
    fault: Userfaultfd,
    /// Whether the kernel can poison pages (Linux 6.6).
    can_poison: bool,
    page_size: u64,
    /// Pages that are no longer filled from the images: filled, unreadable, discarded, or unmapped.
    ///
    /// Changed only under the lock of `ledger`, together with the pages themselves. A page that is
    /// missing and settled was discarded, and is zeros.
    settled: PageBits,
    ledger: LedgerLock,
    /// Readable if faults wait that were read by a thread other than the one that waits for them.
    bell: EventFd,
    /// Number of messages other than faults that were read.
    changes: AtomicU64,
    /// Bytes of the images that were filled.
    loaded: AtomicU64,
    /// Those of them that the fault handler filled.
    loaded_by_faults: AtomicU64,
    /// The totals of all memory that is filled from the source.
    counters: Arc<Counters>,
    started: Instant,
    status: Status,
}

/// What [`Pages`] consist of.
pub(crate) struct Parts {
    pub(crate) source: Box<dyn RamSource>,
    /// Registered with `fault`.
    pub(crate) target: Target,
    pub(crate) fault: Userfaultfd,
    pub(crate) can_poison: bool,
    pub(crate) settled: PageBits,
    pub(crate) counters: Arc<Counters>,
    pub(crate) status: Status,
}

impl Pages {
    /// Returns the pages of registered memory, all of them missing.
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        Ok(Self {
            page_size: parts.settled.page_size(),
            source: parts.source,
            target: parts.target,
            fault: parts.fault,
            can_poison: parts.can_poison,
            settled: parts.settled,
            ledger: LedgerLock::default(),
            bell: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            changes: AtomicU64::new(0),
            loaded: AtomicU64::new(0),
            loaded_by_faults: AtomicU64::new(0),
            counters: parts.counters,
            started: Instant::now(),
            status: parts.status,
        })
    }

    pub(crate) fn source(&self) -> &dyn RamSource {
        &*self.source
    }

    pub(crate) fn status(&self) -> &Status {
        &self.status
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    fn regions(&self) -> &Regions {
        self.target.regions()
    }

    /// Returns the size of the memory: that of the RAM, in whole pages.
    pub(crate) fn memory_size(&self) -> u64 {
        self.regions().len()
    }

    /// Returns the number of bytes of the images that were filled.
    pub(crate) fn loaded(&self) -> u64 {
        self.loaded.load(Ordering::Relaxed)
    }

    /// Returns the number of those bytes that the fault handler filled.
    pub(crate) fn loaded_by_faults(&self) -> u64 {
        self.loaded_by_faults.load(Ordering::Relaxed)
    }

    /// Returns the time since filling has begun.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns the number of messages other than faults that were read.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Returns a descriptor that is readable while a message is unread.
    pub(crate) fn messages(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }

    /// Returns the offset in the RAM of an address.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        self.regions().offset_of(address)
    }

    /// Returns whether the page at an offset is no longer filled from the images.
    pub(crate) fn is_settled(&self, offset: u64) -> bool {
        self.settled.contains(offset)
    }

    /// Clips an offset to the RAM: the images end with the RAM, the memory with a page.
    pub(crate) fn clip(&self, end: u64) -> u64 {
        end.min(self.source.ram_size())
    }

    /// Returns the runs of pages of which the source stores any byte. They ascend if the source
    /// keeps its contract.
    pub(crate) fn stored(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let bytes = within.start..self.clip(within.end);
        let mut stored = self
            .source
            .populated(bytes.clone())
            .map(move |range| range.start.max(bytes.start)..range.end.min(bytes.end))
            .filter(|range| !range.is_empty())
            .map(|Range { start, end }| {
                start - start % self.page_size..end.next_multiple_of(self.page_size)
            })
            .peekable();
        std::iter::from_fn(move || {
            let mut run = stored.next()?;
            // A range before the run stays one of its own, for the caller to report.
            let joins = |next: &Range<u64>, run: &Range<u64>| {
                run.start <= next.start && next.start <= run.end
            };
            while let Some(next) = stored.next_if(|next| joins(next, &run)) {
                run.end = run.end.max(next.end);
            }
            Some(run)
        })
    }

    /// Fills the pages of `pages` that are not settled by `fill`, which gets an address and the
    /// range at that address.
    ///
    /// # Errors
    /// Returns [`UserfaultfdError::Occupied`] if a page that is not settled is present, because
    /// something else filled it. Otherwise returns [`UserfaultfdError::Fill`].
    fn settle(
        &self,
        pages: Range<u64>,
        by: Role,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), LazyError> {
        let settled = self.settle_in_turns(pages, by, fill);
        if by.prefetches() {
            // The turn may not have ended yet: there was nothing left to fill, or an error.
            self.end_turn(&mut self.ledger.lock());
        }
        settled
    }

    fn settle_in_turns(
        &self,
        pages: Range<u64>,
        by: Role,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), LazyError> {
        let mut rest = pages;
        let mut pause = Pause::default();
        // The handler does not stop, because an access waits.
        while by == Role::Handler || !self.status.is_stopped() {
            if self.settled.first_missing(rest.clone()).is_none() {
                break;
            }
            let mut ledger = self.ledger.lock_for(by, || self.status.is_stopped());
            if by.prefetches() && self.status.is_stopped() {
                break;
            }
            let Some(missing) = self.settled.first_missing(rest.clone()) else {
                break;
            };
            let step = missing.start..missing.end.min(missing.start + STEP.max(self.page_size));
            let part = self.regions().parts(step).next();
            let (address, part) = part.expect("what is missing is a part of the memory");
            let Filled { bytes, stop } = fill(address, &part);
            let done = part.start..part.start + bytes;
            rest.start = done.end;
            let next = done.end;
            self.settled.add(done);
            if by.prefetches() && bytes > 0 {
                self.end_turn(&mut ledger);
            }
            match stop {
                None => {}
                Some(Errno::EAGAIN) => {
                    // The handler reads no messages in a turn of the prefetcher, which would
                    // otherwise wait forever.
                    if by.prefetches() && ledger.turns.is_prefetching() {
                        let changes = self.record_messages(&mut ledger)?;
                        if ledger.turns.changed(changes) {
                            self.ledger.notify();
                        }
                        self.ring(&ledger);
                    }
                    drop(ledger);
                    self.let_changes_continue(by, &mut pause)?;
                }
                Some(Errno::EEXIST) => {
                    if let Target::Own(memory) = &self.target {
                        self.make_inaccessible(memory, &mut ledger, next)?;
                    }
                    let occupied = || UserfaultfdError::Occupied { offset: next }.into();
                    // Record it even if the page is only a neighbor of the faulting page.
                    self.status.record_error(occupied());
                    return Err(occupied());
                }
                Some(errno) => return Err(fill_error(next, errno)),
            }
        }
        Ok(())
    }

    /// Ends the prefetcher's turn, if it has one.
    fn end_turn(&self, ledger: &mut Ledger) {
        if ledger.turns.stepped() {
            self.ledger.notify();
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The source need not be `Debug`.
        f.debug_struct("Pages")
            .field("target", &self.target)
            .field("fault", &self.fault)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// Returns the error for a failure to read messages.
pub(crate) fn wait_error(error: std::io::Error) -> LazyError {
    UserfaultfdError::Wait(error).into()
}

fn fill_error(offset: u64, errno: Errno) -> LazyError {
    let source = errno.into();
    UserfaultfdError::Fill { offset, source }.into()
}

#[cfg(test)]
impl Pages {
    /// Keeps all pages from being filled until the guard is dropped.
    pub(crate) fn hold(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock()
    }

    /// Fills a page as something else would. No other descriptor can.
    pub(crate) fn occupy(&self, offset: u64) -> Filled {
        let (address, _) = self.regions().parts(offset..offset + 1).next().unwrap();
        self.fault.zero(address, self.page_size)
    }
}

#[cfg(test)]
mod tests;
