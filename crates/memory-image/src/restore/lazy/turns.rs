//! Whose turn it is to fill pages: faults go first, and reading ahead goes on however many there are.

/// Faults that are answered while the prefetcher waits, before it gets a turn. A turn takes as long as
/// copying 64 KiB, so this bounds both what the turns add to a fault on average and how slow reading
/// ahead becomes.
const FAULTS: u32 = 8;
/// Messages other than faults that are read in a turn of the prefetcher at most.
///
/// While such a message is unread, or its cause has not gone on, the kernel fills no page. A thread that
/// discards pages and touches them soon waits for its fault, so that the messages end; those of threads
/// that only discard may not, and then faults are not to wait for the prefetcher.
const CHANGES: u32 = 1024;

/// Turns of the handler, which answers faults, and of the prefetcher, which fills one step in a turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// A fault is being answered.
    answering: bool,
    /// It is the prefetcher's turn, and no fault is answered.
    ahead: bool,
    /// Faults answered since the prefetcher's last turn.
    faults: u32,
    /// Messages read in this turn of the prefetcher.
    changes: u32,
}

impl Turns {
    /// Returns whether the prefetcher must get a turn before the next fault is answered, and begins that
    /// turn. It lasts until [`stepped`](Self::stepped) or [`changed`](Self::changed) ends it.
    pub(crate) fn begin_ahead(&mut self, prefetcher_waits: bool) -> bool {
        if prefetcher_waits && self.faults >= FAULTS {
            (self.ahead, self.changes) = (true, 0);
        }
        self.ahead
    }

    /// Notes that a fault is answered next, or that there is none.
    pub(crate) fn answer(&mut self, fault: bool) {
        self.answering = fault;
        self.faults = self.faults.saturating_add(u32::from(fault));
    }

    /// Returns whether it is the prefetcher's turn, and faults wait.
    pub(crate) fn is_ahead(&self) -> bool {
        self.ahead
    }

    /// Returns whether the prefetcher may fill pages: in its turn, and while no fault is answered.
    pub(crate) fn may_read_ahead(&self) -> bool {
        self.ahead || !self.answering
    }

    /// Notes that the prefetcher has filled a step, or ends. Returns whether that has ended a turn.
    pub(crate) fn stepped(&mut self) -> bool {
        self.faults = 0;
        std::mem::take(&mut self.ahead)
    }

    /// Notes that the prefetcher has read messages in its turn. Returns whether they have ended it.
    pub(crate) fn changed(&mut self, messages: u32) -> bool {
        self.changes = self.changes.saturating_add(messages);
        self.changes >= CHANGES && self.stepped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_ahead_gets_a_turn_after_some_faults() {
        let mut turns = Turns::default();
        for _ in 0..3 {
            for _ in 0..FAULTS {
                assert!(!turns.begin_ahead(true));
                turns.answer(true);
                assert!(!turns.may_read_ahead());
            }
            assert!(turns.begin_ahead(true));
            assert!(turns.is_ahead() && turns.may_read_ahead());
            assert!(turns.stepped());
            assert!(!turns.is_ahead() && !turns.may_read_ahead());
        }
    }

    /// The queue of faults may be empty for so short a time that the prefetcher never sees it.
    #[test]
    fn a_moment_without_faults_does_not_take_the_turn_away() {
        let mut turns = Turns::default();
        for _ in 0..FAULTS {
            turns.answer(true);
            turns.answer(false);
        }
        assert!(turns.may_read_ahead());
        assert!(turns.begin_ahead(true));
    }

    #[test]
    fn no_turn_is_given_to_a_prefetcher_that_does_not_wait() {
        let mut turns = Turns::default();
        (0..2 * FAULTS).for_each(|_| turns.answer(true));
        assert!(!turns.begin_ahead(false));
        assert!(!turns.is_ahead());
    }

    #[test]
    fn endless_messages_end_a_turn_of_reading_ahead() {
        let mut turns = Turns::default();
        (0..FAULTS).for_each(|_| turns.answer(true));
        assert!(turns.begin_ahead(true));
        let messages = (1..).find(|_| turns.changed(1));
        assert_eq!(messages, Some(CHANGES));
        assert!(!turns.is_ahead());
        assert!(!turns.begin_ahead(true));
    }
}
