//! Progress shared by the writer and the zero scanner, and cancellation.

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Progress of one `write_full` or `write_diff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes written or [skipped](crate::Options::skip_zeros) so far.
    pub bytes_done: u64,
    /// Total of bytes to write or skip.
    pub bytes_total: u64,
    /// The size of a page of the memory file in bytes.
    pub page_size: u64,
}

impl Progress {
    /// Returns the number of whole pages of the memory file written so far.
    #[must_use]
    pub fn pages_done(&self) -> u64 {
        self.bytes_done / self.page_size
    }

    /// Returns the total of pages of the memory file to write.
    #[must_use]
    pub fn pages_total(&self) -> u64 {
        self.bytes_total / self.page_size
    }
}

/// A token that cancels a write from another thread. All clones share one state.
///
/// A write that is under way ends with
/// [`SnapshotError::Cancelled`](crate::SnapshotError::Cancelled) once the chunks in flight are
/// complete; a later write fails immediately. The writer then refuses to commit, and dropping it
/// removes the staged file. A commit that is under way is not interrupted.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Creates a token that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels the token. This cannot be undone.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Returns whether the token is cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Receives progress and can cancel.
pub(crate) struct Observer {
    pub(crate) progress: Option<Box<dyn FnMut(Progress) + Send>>,
    pub(crate) cancel: CancelToken,
}

impl Observer {
    pub(crate) fn report(&mut self, progress: Progress) -> ControlFlow<()> {
        if let Some(callback) = &mut self.progress {
            callback(progress);
        }
        if self.cancel.is_cancelled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Counts written and skipped bytes and reports them.
pub(crate) struct ProgressCounter<'w> {
    observer: RefCell<&'w mut Observer>,
    page_size: u64,
    bytes_total: u64,
    written: Cell<u64>,
    skipped: Cell<u64>,
    cancelled: Cell<bool>,
}

impl<'w> ProgressCounter<'w> {
    pub(crate) fn new(observer: &'w mut Observer, page_size: u64, bytes_total: u64) -> Self {
        Self {
            observer: RefCell::new(observer),
            page_size,
            bytes_total,
            written: Cell::new(0),
            skipped: Cell::new(0),
            cancelled: Cell::new(false),
        }
    }

    /// Reports that `bytes` were written so far.
    pub(crate) fn wrote(&self, bytes: u64) -> ControlFlow<()> {
        self.written.set(bytes);
        self.report()
    }

    /// Reports that `bytes` more are skipped.
    pub(crate) fn skipped(&self, bytes: u64) -> ControlFlow<()> {
        if bytes == 0 {
            return ControlFlow::Continue(());
        }
        self.skipped.set(self.skipped.get() + bytes);
        self.report()
    }

    /// Returns whether the write was cancelled.
    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled.get()
    }

    fn report(&self) -> ControlFlow<()> {
        let bytes_done = self.written.get() + self.skipped.get();
        let flow = self.observer.borrow_mut().report(Progress {
            bytes_done,
            // A bitmap that is marked during the write may yield more pages than were counted.
            bytes_total: self.bytes_total.max(bytes_done),
            page_size: self.page_size,
        });
        self.cancelled.set(flow.is_break());
        flow
    }
}
