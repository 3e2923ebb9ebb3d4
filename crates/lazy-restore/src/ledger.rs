//! What is known about the memory besides its settled pages, and the lock that protects it.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::counters::FillReason;
use crate::turns::Turns;

/// The thread that fills pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A thread that handles faults. It reads the messages, except in turns of the prefetcher.
    Handler,
    /// A thread that fills pages in the background.
    Prefetcher,
    /// The same thread, while it fills pages of the working set.
    WorkingSet,
}

impl Role {
    /// Returns whether the thread fills pages in the background.
    pub(crate) fn prefetches(self) -> bool {
        self != Self::Handler
    }

    /// Returns the reason for the pages that the thread fills.
    pub(crate) fn reason(self) -> FillReason {
        match self {
            Self::Handler => FillReason::Fault,
            Self::Prefetcher => FillReason::Prefetch,
            Self::WorkingSet => FillReason::WorkingSet,
        }
    }
}

/// State of messages and pages.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Addresses of faults that are not handled yet.
    pub(crate) waiting: VecDeque<u64>,
    /// Schedules the handler and the prefetcher.
    pub(crate) turns: Turns,
    /// Pages that could not be read, and were poisoned or made inaccessible.
    pub(crate) inaccessible: BTreeSet<u64>,
    /// Ranges that were unmapped or moved.
    pub(crate) unmapped: Vec<Range<u64>>,
    /// Addresses from and to which parts of the memory were moved. They are to be made
    /// inaccessible.
    pub(crate) moved: Vec<Range<u64>>,
}

/// The lock of the [`Ledger`], which the handler gets before the prefetcher.
#[derive(Debug, Default)]
pub(crate) struct LedgerLock {
    ledger: Mutex<Ledger>,
    /// The number of handlers that wait for the lock. The lock is not fair, so the prefetcher does
    /// not take it while there are any.
    handlers_wait: AtomicU32,
    /// Set while the prefetcher waits for the lock, or for its turn. Cleared under the lock.
    prefetcher_waits: AtomicBool,
    /// Signalled when no fault is being handled any more, and when a turn of the prefetcher begins
    /// or ends.
    turn: Condvar,
}

impl LedgerLock {
    /// Takes the lock for changes that need no turn.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Ledger> {
        locked(&self.ledger)
    }

    /// Takes the lock, the handler first. The prefetcher gets it once it may fill pages, or once
    /// `stopped` returns true and [`notify`](Self::notify) was called.
    pub(crate) fn lock_for(&self, by: Role, stopped: impl Fn() -> bool) -> MutexGuard<'_, Ledger> {
        match by {
            Role::Handler => {
                self.handlers_wait.fetch_add(1, Ordering::Relaxed);
                let ledger = self.lock();
                self.handlers_wait.fetch_sub(1, Ordering::Relaxed);
                ledger
            }
            Role::Prefetcher | Role::WorkingSet => {
                // Set before it waits for anything, so that the handler gives it a turn.
                self.prefetcher_waits.store(true, Ordering::Relaxed);
                while self.handlers_wait.load(Ordering::Relaxed) > 0 {
                    std::thread::yield_now();
                }
                let mut ledger = self.lock();
                while !ledger.turns.may_prefetch() && !stopped() {
                    ledger = self.wait(ledger);
                }
                self.prefetcher_waits.store(false, Ordering::Relaxed);
                ledger
            }
        }
    }

    /// Returns whether the prefetcher waits for the lock, or for its turn.
    pub(crate) fn prefetcher_waits(&self) -> bool {
        self.prefetcher_waits.load(Ordering::Relaxed)
    }

    /// Waits until [`notify`](Self::notify) is called.
    pub(crate) fn wait<'l>(&self, ledger: MutexGuard<'l, Ledger>) -> MutexGuard<'l, Ledger> {
        let waited = self.turn.wait(ledger);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the threads that wait for a turn.
    pub(crate) fn notify(&self) {
        self.turn.notify_all();
    }
}

/// Locks a mutex. Poisoning is ignored: no code panics while it leaves the protected state
/// inconsistent.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetcher_waits_while_a_fault_is_handled() {
        let lock = LedgerLock::default();
        lock.lock().turns.begin(true);
        std::thread::scope(|scope| {
            let lock = &lock;
            let stopped = || {
                // The lock is held, so the fault ends once the prefetcher waits.
                scope.spawn(move || {
                    let mut ledger = lock.lock();
                    ledger.turns.end(1);
                    lock.notify();
                });
                false
            };
            let ledger = lock.lock_for(Role::Prefetcher, stopped);
            assert!(ledger.turns.may_prefetch());
            assert!(!lock.prefetcher_waits());
        });
    }

    #[test]
    fn stopped_prefetcher_does_not_wait_for_a_turn() {
        let lock = LedgerLock::default();
        lock.lock().turns.begin(true);
        let ledger = lock.lock_for(Role::Prefetcher, || true);
        assert!(!ledger.turns.may_prefetch());
    }
}
