//! The end of filling: all pages are in memory, or the memory becomes inaccessible.

use std::ops::Range;

use super::{Pages, fill_error, wait_error};
use crate::error::LazyError;

impl Pages {
    /// Ends filling: no page is missing any more, and no fault needs a handler.
    pub(crate) fn finish(&self) {
        self.status.set_finished(true);
        let mapped = self.mapped();
        let unregister = |range: &Range<u64>| self.memory.unregister(&self.fault, range.clone());
        if let Err(errno) = mapped.iter().try_for_each(unregister) {
            // Some pages may still be missing, and their faults are to be handled with zeros.
            self.status.set_finished(false);
            return self.status.record_error(fill_error(0, errno));
        }
        if let Err(error) = self.memory.restore_to_children(&mapped) {
            self.status.record_error(error.into());
        }
        self.status.stop_handler();
    }

    /// Aborts filling. Every later access to the memory fails, so that none waits forever or finds
    /// zeros.
    pub(crate) fn abort(&self, why: LazyError) {
        self.status.record_error(why);
        self.revoke();
        self.status.end_prefetch();
    }

    /// Makes the memory inaccessible.
    pub(crate) fn revoke(&self) {
        self.status.stop_prefetch();
        // Take the lock, so that the prefetcher sees the flag or is waiting.
        drop(self.ledger.lock());
        self.ledger.notify();
        self.status.set_finished(true);
        for range in self.mapped() {
            // Unregister only inaccessible memory: unregistered missing pages are zeros.
            let inaccessible = self.memory.make_inaccessible(range.clone());
            let inaccessible =
                inaccessible.and_then(|()| self.memory.unregister(&self.fault, range.clone()));
            if let Err(errno) = inaccessible {
                self.status.record_error(fill_error(range.start, errno));
                // Accesses to missing pages wait from now on.
                if let Err(error) = self.fault.leave_open() {
                    self.status.record_error(wait_error(error));
                }
            }
        }
        self.drain_changes();
    }

    /// Unregisters memory that is going to be unmapped.
    pub(crate) fn unregister_all(&self) {
        if let Err(errno) = self.memory.unregister(&self.fault, 0..self.memory.len()) {
            self.status.record_error(fill_error(0, errno));
        }
        self.drain_changes();
    }

    /// Returns the parts of the memory that are still mapped.
    fn mapped(&self) -> Vec<Range<u64>> {
        let mut unmapped = self.ledger.lock().unmapped.clone();
        unmapped.sort_by_key(|range| range.start);
        let (mut mapped, mut at) = (Vec::new(), 0);
        for range in unmapped {
            if at < range.start {
                mapped.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < self.memory.len() {
            mapped.push(at..self.memory.len());
        }
        mapped
    }
}
