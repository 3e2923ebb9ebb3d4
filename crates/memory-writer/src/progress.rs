//! Reports the progress of writes, and cancels them.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use sparse_file::{CancelToken, Progress};

/// A progress function of the caller.
pub(crate) type Callback = Arc<Mutex<dyn FnMut(Progress) -> ControlFlow<()> + Send>>;

/// Counts written and skipped bytes, reports them, and can cancel the write.
#[derive(Clone, Default)]
pub(crate) struct Reporter {
    pub(crate) callback: Option<Callback>,
    pub(crate) cancel: CancelToken,
    total: u64,
    written: u64,
    skipped: u64,
    cancelled: bool,
}

impl Reporter {
    /// Begins to count a write of `total` bytes.
    pub(crate) fn begin(&mut self, total: u64) -> ControlFlow<()> {
        (self.total, self.written, self.skipped) = (total, 0, 0);
        self.report()
    }

    /// Reports that `bytes` were written so far.
    pub(crate) fn wrote(&mut self, bytes: u64) -> ControlFlow<()> {
        self.written = bytes;
        self.report()
    }

    /// Reports that `bytes` more are skipped.
    pub(crate) fn skipped(&mut self, bytes: u64) -> ControlFlow<()> {
        self.skipped += bytes;
        self.report()
    }

    /// Returns whether the write was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    fn report(&mut self) -> ControlFlow<()> {
        let progress = Progress::new(self.written + self.skipped, self.total);
        let mut flow = ControlFlow::Continue(());
        if let Some(callback) = &self.callback {
            let mut callback = callback.lock().unwrap_or_else(PoisonError::into_inner);
            flow = callback(progress);
        }
        self.cancelled = flow.is_break() || self.cancel.is_cancelled();
        match self.cancelled {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter")
            .field("callback", &self.callback.is_some())
            .field("cancel", &self.cancel)
            .finish_non_exhaustive()
    }
}
