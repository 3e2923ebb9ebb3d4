//! Schedules the fault handler and the prefetcher: faults have priority, and prefetching progresses
//! at any rate of faults.

/// Faults that are handled while the prefetcher waits, before it gets a turn. A turn takes as long
/// as copying 64 KiB, so this bounds both the average delay of a fault and the slowdown of
/// prefetching.
const FAULTS: u32 = 8;
/// Upper bound on the messages other than faults that are read in a turn of the prefetcher.
///
/// While such a message is unread, or its cause is still in progress, the kernel fills no page. A
/// thread that discards pages and touches them soon waits for its own fault, so its messages end.
/// The messages of threads that only discard may not end, and then faults must not wait for the
/// prefetcher.
const CHANGES: u32 = 1024;

/// Turns of the handler, which handles faults, and of the prefetcher, which fills one step in a
/// turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// The number of faults that are being handled.
    handling: u32,
    /// Whether it is the prefetcher's turn, in which no fault is handled.
    prefetching: bool,
    /// Faults handled since the prefetcher's last turn.
    faults: u32,
    /// Messages read in this turn of the prefetcher.
    changes: u32,
}

impl Turns {
    /// Returns whether the prefetcher must get a turn before the next fault is handled, and begins
    /// that turn. It lasts until [`stepped`](Self::stepped) or [`changed`](Self::changed) ends it.
    pub(crate) fn begin_prefetch(&mut self, prefetcher_waits: bool) -> bool {
        if prefetcher_waits && self.faults >= FAULTS && !self.prefetching {
            (self.prefetching, self.changes) = (true, 0);
        }
        self.prefetching
    }

    /// Records whether a fault is handled next.
    pub(crate) fn begin(&mut self, fault: bool) {
        self.handling += u32::from(fault);
        self.faults = self.faults.saturating_add(u32::from(fault));
    }

    /// Records that faults were handled.
    pub(crate) fn end(&mut self, handled: u32) {
        self.handling = self.handling.saturating_sub(handled);
    }

    /// Returns whether it is the prefetcher's turn, and faults wait.
    pub(crate) fn is_prefetching(&self) -> bool {
        self.prefetching
    }

    /// Returns whether the prefetcher may fill pages: in its turn, and while no fault is handled.
    pub(crate) fn may_prefetch(&self) -> bool {
        self.prefetching || self.handling == 0
    }

    /// Records that the prefetcher has filled a step, or ends. Returns whether this ended a turn.
    pub(crate) fn stepped(&mut self) -> bool {
        self.faults = 0;
        std::mem::take(&mut self.prefetching)
    }

    /// Records that the prefetcher has read messages in its turn. Returns whether they ended it.
    pub(crate) fn changed(&mut self, messages: u32) -> bool {
        self.changes = self.changes.saturating_add(messages);
        self.changes >= CHANGES && self.stepped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetcher_gets_a_turn_after_some_faults() {
        let mut turns = Turns::default();
        for _ in 0..3 {
            for _ in 0..FAULTS {
                assert!(!turns.begin_prefetch(true));
                turns.begin(true);
                assert!(!turns.may_prefetch());
            }
            assert!(turns.begin_prefetch(true));
            assert!(turns.is_prefetching() && turns.may_prefetch());
            assert!(turns.stepped());
            assert!(!turns.is_prefetching() && !turns.may_prefetch());
        }
    }

    /// The queue of faults may be empty for so short a time that the prefetcher never sees it.
    #[test]
    fn brief_lack_of_faults_does_not_cancel_the_turn() {
        let mut turns = Turns::default();
        for _ in 0..FAULTS {
            turns.begin(true);
            turns.end(1);
        }
        assert!(turns.may_prefetch());
        assert!(turns.begin_prefetch(true));
    }

    #[test]
    fn prefetcher_that_does_not_wait_gets_no_turn() {
        let mut turns = Turns::default();
        (0..2 * FAULTS).for_each(|_| turns.begin(true));
        assert!(!turns.begin_prefetch(false));
        assert!(!turns.is_prefetching());
    }

    #[test]
    fn endless_messages_end_the_turn_of_the_prefetcher() {
        let mut turns = Turns::default();
        (0..FAULTS).for_each(|_| turns.begin(true));
        assert!(turns.begin_prefetch(true));
        let messages = (1..).find(|_| turns.changed(1));
        assert_eq!(messages, Some(CHANGES));
        assert!(!turns.is_prefetching());
        assert!(!turns.begin_prefetch(true));
    }
}
