//! The end of filling: all pages are in memory, or the memory becomes inaccessible.

use std::ops::Range;

use super::{Pages, fill_error, wait_error};
use crate::error::LazyError;
use crate::memory::Memory;
use crate::target::Target;

impl Pages {
    /// Ends filling: no page is missing any more, and no fault needs a handler.
    pub(crate) fn finish(&self) {
        self.status.set_finished(true);
        let mapped = self.mapped();
        let unregister = |range: &Range<u64>| self.unregister(range.clone());
        if let Err(errno) = mapped.iter().try_for_each(unregister) {
            let error = fill_error(0, errno);
            if let Target::Peer(_) = self.target {
                // Faults on discarded pages would wait for a server that ends.
                return self.abort_peer(error);
            }
            // Some pages may still be missing, and their faults are to be handled with zeros.
            self.status.set_finished(false);
            return self.status.record_error(error);
        }
        if let Target::Own(memory) = &self.target
            && let Err(error) = memory.restore_to_children(&mapped)
        {
            self.status.record_error(error.into());
        }
        self.status.set_filled();
        self.status.stop_handler();
    }

    /// Aborts filling. Every later access to the memory fails, so that none waits forever or finds
    /// zeros. If the other process has exited, only ends filling.
    pub(crate) fn abort(&self, why: LazyError) {
        if let Target::Peer(_) = self.target {
            return self.abort_peer(why);
        }
        self.status.record_error(why);
        self.revoke();
        self.status.end_prefetch();
    }

    /// Makes the memory inaccessible.
    pub(crate) fn revoke(&self) {
        self.stop_filling();
        match &self.target {
            Target::Own(memory) => self.revoke_own(memory),
            Target::Peer(peer) => self.revoke_peer(peer),
        }
    }

    /// Stops the prefetcher, and the handling of faults of finished memory.
    pub(super) fn stop_filling(&self) {
        self.status.stop_prefetch();
        // Take the lock, so that the prefetcher sees the flag or is waiting.
        drop(self.ledger.lock());
        self.ledger.notify();
        self.status.set_finished(true);
    }

    fn revoke_own(&self, memory: &Memory) {
        for range in self.mapped() {
            // Unregister only inaccessible memory: unregistered missing pages are zeros.
            let inaccessible = memory.make_inaccessible(range.clone());
            let inaccessible = inaccessible.and_then(|()| self.unregister(range.clone()));
            if let Err(errno) = inaccessible {
                self.status.record_error(fill_error(range.start, errno));
                self.leave_open();
            }
        }
        self.drain_changes();
    }

    /// Keeps the userfaultfd open: accesses to missing pages wait from now on.
    pub(super) fn leave_open(&self) {
        if let Err(error) = self.fault.leave_open() {
            self.status.record_error(wait_error(error));
        }
    }

    /// Unregisters memory that is going to be unmapped.
    pub(crate) fn unregister_all(&self) {
        if let Err(errno) = self.unregister(0..self.memory_size()) {
            self.status.record_error(fill_error(0, errno));
        }
        self.drain_changes();
    }

    /// Unregisters a range, after which missing pages are zeros, and wakes waiting accesses.
    pub(super) fn unregister(&self, range: Range<u64>) -> nix::Result<()> {
        self.regions()
            .parts(range)
            .try_for_each(|(address, part)| self.fault.unregister(address, part.end - part.start))
    }

    /// Returns the parts of the memory that are still mapped.
    pub(super) fn mapped(&self) -> Vec<Range<u64>> {
        let mut unmapped = self.ledger.lock().unmapped.clone();
        unmapped.sort_by_key(|range| range.start);
        let (mut mapped, mut at) = (Vec::new(), 0);
        for range in unmapped {
            if at < range.start {
                mapped.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < self.memory_size() {
            mapped.push(at..self.memory_size());
        }
        mapped
    }
}
