//! Messages of the kernel: faults, and changes of the memory.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_reader::FlaggedRegion;

use super::{Pages, wait_error};
use crate::counters::FillReason;
use crate::error::LazyError;
use crate::ledger::{Ledger, Role};
use crate::memory::Memory;
use crate::pause::Pause;
use crate::target::Target;
use crate::userfaultfd::{Message, UserfaultfdError};

impl Pages {
    /// Returns the address of the next page that an access waits for, if there is one. Records all
    /// changes of the memory before the access.
    ///
    /// `handled` is the number of faults, 0 or 1, that the calling thread has handled since its
    /// last call.
    pub(crate) fn next_fault(&self, handled: u32) -> Result<Option<u64>, LazyError> {
        let mut ledger = self.read_messages()?;
        ledger.turns.end(handled);
        let prefetcher_waits = self.ledger.prefetcher_waits() && !self.status.is_stopped();
        if !ledger.waiting.is_empty() && ledger.turns.begin_prefetch(prefetcher_waits) {
            self.ledger.notify();
            while ledger.turns.is_prefetching() && !self.status.is_stopped() {
                ledger = self.ledger.wait(ledger);
            }
            drop(ledger);
            ledger = self.read_messages()?;
        }
        let next = ledger.waiting.pop_front();
        // The threads that handle the others may not have begun to wait before these were read.
        self.ring(&ledger);
        ledger.turns.begin(next.is_some());
        if next.is_none() {
            self.ledger.notify();
        }
        Ok(next)
    }

    /// Lets the thread that waits for faults look for those in the ledger.
    pub(super) fn ring(&self, ledger: &Ledger) {
        if !ledger.waiting.is_empty() {
            // It cannot fail: the counter is far from its limit.
            let _ = self.bell.write(1);
        }
    }

    /// Returns a descriptor that is readable after [`ring`](Self::ring).
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Makes the [`bell`](Self::bell) unreadable.
    pub(crate) fn silence(&self) {
        // It fails if the bell was not readable.
        let _ = self.bell.read();
    }

    /// Returns whether the cause of a message is still in progress. See
    /// [`Userfaultfd::is_changing`](crate::userfaultfd::Userfaultfd::is_changing).
    pub(crate) fn is_changing(&self) -> bool {
        self.fault.is_changing()
    }

    /// Lets a thread in `madvise`, `munmap` or `mremap` continue. The handler also reads its
    /// message. No page can be filled until the thread has continued.
    pub(super) fn let_changes_continue(
        &self,
        by: Role,
        pause: &mut Pause,
    ) -> Result<(), LazyError> {
        if by == Role::Handler {
            let ledger = self.read_messages()?;
            self.ring(&ledger);
        }
        pause.wait();
        Ok(())
    }

    /// Lets every thread continue that waits for its message to be read. Nothing is registered any
    /// more.
    pub(super) fn drain_changes(&self) {
        let mut pause = Pause::default();
        while self.fault.is_changing() {
            if let Err(error) = self.let_changes_continue(Role::Handler, &mut pause) {
                return self.status.record_error(error);
            }
        }
    }

    /// Reads and records all messages.
    fn read_messages(&self) -> Result<MutexGuard<'_, Ledger>, LazyError> {
        loop {
            // A page must not be filled after the message that it is discarded is read and before
            // this is recorded: the discarding thread continues as soon as the message is read.
            let mut ledger = self.ledger.lock_for(Role::Handler, || false);
            self.record_messages(&mut ledger)?;
            let Some(moved) = ledger.moved.pop() else {
                return Ok(ledger);
            };
            drop(ledger);
            if let Target::Peer(_) = self.target {
                return Err(UserfaultfdError::MovedElsewhere.into());
            }
            // After MREMAP_DONTUNMAP the old addresses are still mapped. After another move they
            // often are not, and another mapping may be there now.
            for registered in still_registered(moved) {
                self.revoke_moved_pages(registered);
            }
        }
    }

    /// Reads and records all messages. Returns the number of messages other than faults.
    pub(super) fn record_messages(&self, ledger: &mut Ledger) -> Result<u32, LazyError> {
        let mut changes = 0;
        while let Some(message) = self.fault.next_message().map_err(wait_error)? {
            changes += u32::from(!matches!(message, Message::Fault(_)));
            self.record_message(ledger, message);
        }
        Ok(changes)
    }

    fn record_message(&self, ledger: &mut Ledger, message: Message) {
        if let Message::Fault(address) = message {
            return ledger.waiting.push_back(address);
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        let removed = match message {
            Message::Fault(_) => unreachable!("returned above"),
            Message::Removed(addresses) => {
                for pages in self.regions().at(addresses) {
                    ledger.inaccessible.retain(|page| !pages.contains(page));
                    self.counters
                        .add_filled(FillReason::Removed, pages.end - pages.start);
                    self.settled.add(pages);
                }
                return;
            }
            Message::Unmapped(addresses) => addresses,
            Message::Moved { from, to } => {
                ledger.moved.push(to..to + (from.end - from.start));
                ledger.moved.push(from.clone());
                from
            }
        };
        for pages in self.regions().at(removed) {
            let (offset, len) = (pages.start, pages.end - pages.start);
            self.settled.add(pages.clone());
            ledger.unmapped.push(pages);
            // A process that ends may unmap its memory first.
            if let Target::Own(_) = self.target {
                self.status
                    .record_error(UserfaultfdError::Unmapped { offset, len }.into());
            }
        }
    }

    /// Makes accesses to missing pages fail where memory was moved to or from. Their faults are not
    /// handled: the pages at the new address are not part of the guest's RAM, and the pages at the
    /// old address have lost their content.
    fn revoke_moved_pages(&self, moved: Range<u64>) {
        let mut at = moved.start;
        while at < moved.end && self.can_poison {
            let poisoned = self.fault.poison(at, moved.end - at);
            at += poisoned.bytes;
            match poisoned.stop {
                None => {}
                Some(Errno::EEXIST) => at += self.page_size,
                Some(Errno::EAGAIN) => {
                    // Other changes of this range affect only the VMM's own memory.
                    let mut ledger = self.ledger.lock();
                    match self.fault.next_message() {
                        Ok(Some(message)) => self.record_message(&mut ledger, message),
                        Ok(None) => std::thread::yield_now(),
                        Err(_) => return,
                    }
                }
                // This page was unmapped.
                Some(_) => at += self.page_size,
            }
        }
        let inaccessible = match self.can_poison {
            true => self.fault.unregister(moved.start, moved.end - moved.start),
            false => Memory::revoke_moved(&self.fault, &moved),
        };
        // It fails only if the range was unmapped since the message was sent.
        let _ = inaccessible;
    }
}

/// Returns the parts of a range of addresses that are registered with a userfaultfd, or all of it
/// if the kernel does not report this.
fn still_registered(addresses: Range<u64>) -> Vec<Range<u64>> {
    let Ok(mappings) = FlaggedRegion::of_this_process() else {
        return vec![addresses];
    };
    let registered = mappings
        .iter()
        .filter(|mapping| mapping.flags.is_some_and(|flags| flags.filled_on_fault));
    let parts = registered.map(|mapping| {
        let Range { start, end } = mapping.region.addresses;
        start.max(addresses.start)..end.min(addresses.end)
    });
    parts.filter(|part| !part.is_empty()).collect()
}
