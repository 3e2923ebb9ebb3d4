//! How far filling is, and requests to stop it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::LazyError;
use crate::ledger::locked;
use crate::server::Reaction;
use crate::trace;

/// The state of filling, shared by all threads.
#[derive(Debug)]
pub(crate) struct Status {
    /// The first error.
    failure: OnceLock<Arc<LazyError>>,
    phase: Mutex<Phase>,
    /// Notified when prefetching ends, or is cancelled.
    changed: Condvar,
    /// Set to stop the prefetcher.
    stop_prefetch: AtomicBool,
    /// Set once fault handling has ended: all pages were filled, or the memory is inaccessible.
    finished: AtomicBool,
    /// Set once all pages were filled.
    filled: AtomicBool,
    /// Set before another process is ended because its memory cannot be filled.
    aborted: AtomicBool,
    /// What was done to it.
    reaction: OnceLock<Reaction>,
    /// Set once the process that owns the memory has exited.
    exited: AtomicBool,
    /// Readable once the fault handler is to end. A pipe would not work: a forked child may keep
    /// its other end open.
    stopping: EventFd,
}

/// The state of prefetching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not requested yet, or cancelled.
    Idle,
    /// In progress.
    Running,
    /// Complete, or failed.
    Ended,
}

impl Status {
    /// Returns the state before the threads run. `prefetching` is whether a prefetcher will run.
    pub(crate) fn new(prefetching: bool) -> io::Result<Self> {
        Ok(Self {
            failure: OnceLock::new(),
            phase: Mutex::new(match prefetching {
                true => Phase::Running,
                false => Phase::Idle,
            }),
            changed: Condvar::new(),
            stop_prefetch: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            filled: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            reaction: OnceLock::new(),
            exited: AtomicBool::new(false),
            stopping: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// Records an error. Only the first one is kept.
    pub(crate) fn record_error(&self, error: LazyError) {
        if self.failure.get().is_none() {
            trace::failed(&error);
        }
        let _ = self.failure.set(Arc::new(error));
    }

    /// Returns the first error.
    pub(crate) fn failure(&self) -> Option<&Arc<LazyError>> {
        self.failure.get()
    }

    /// Returns whether the caller is to prefetch, because no thread has begun to.
    pub(crate) fn begin_prefetch(&self) -> bool {
        let mut phase = locked(&self.phase);
        let idle = *phase == Phase::Idle;
        if idle {
            *phase = Phase::Running;
        }
        idle
    }

    /// Records that prefetching has ended, and wakes those that wait for it.
    pub(crate) fn end_prefetch(&self) {
        *locked(&self.phase) = Phase::Ended;
        self.changed.notify_all();
    }

    /// Records that prefetching was cancelled, so that another thread may begin to.
    pub(crate) fn cancel_prefetch(&self) {
        let mut phase = locked(&self.phase);
        // An abort may have ended it.
        if *phase == Phase::Running {
            *phase = Phase::Idle;
        }
        self.changed.notify_all();
    }

    /// Waits while a thread prefetches, at most for `limit`. Returns whether prefetching has ended.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let phase = locked(&self.phase);
        let running = |phase: &mut Phase| *phase == Phase::Running;
        let waited = self.changed.wait_timeout_while(phase, limit, running);
        let (phase, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *phase == Phase::Ended
    }

    /// Requests that the prefetcher stops.
    pub(crate) fn stop_prefetch(&self) {
        self.stop_prefetch.store(true, Ordering::Relaxed);
    }

    /// Returns whether the prefetcher is to stop.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop_prefetch.load(Ordering::Relaxed)
    }

    /// Sets whether fault handling has ended.
    pub(crate) fn set_finished(&self, finished: bool) {
        self.finished.store(finished, Ordering::Release);
    }

    /// Returns whether fault handling has ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Records that all pages were filled.
    pub(crate) fn set_filled(&self) {
        self.filled.store(true, Ordering::Release);
    }

    /// Returns whether all pages were filled.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Records that the process is ended because its memory cannot be filled. Returns whether this
    /// is the first call.
    pub(crate) fn begin_abort(&self) -> bool {
        !self.aborted.swap(true, Ordering::AcqRel)
    }

    /// Records what was done to the process.
    pub(crate) fn set_reaction(&self, reaction: Reaction) {
        let _ = self.reaction.set(reaction);
    }

    /// Returns what was done to the process because its memory cannot be filled.
    pub(crate) fn reaction(&self) -> Option<Reaction> {
        self.reaction.get().copied()
    }

    /// Returns whether the process is ended because its memory cannot be filled.
    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    /// Records that the process that owns the memory has exited.
    pub(crate) fn set_exited(&self) {
        self.exited.store(true, Ordering::Release);
    }

    /// Returns whether the process that owns the memory has exited.
    pub(crate) fn has_exited(&self) -> bool {
        self.exited.load(Ordering::Acquire)
    }

    /// Stops the fault handler.
    pub(crate) fn stop_handler(&self) {
        // It cannot fail: the counter is far from its limit.
        let _ = self.stopping.write(1);
    }

    /// Returns a descriptor that is readable once the fault handler is to end.
    pub(crate) fn stopping(&self) -> BorrowedFd<'_> {
        self.stopping.as_fd()
    }
}
