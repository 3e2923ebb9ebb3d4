//! Reports the progress of writes, and cancels them.

use std::cell::Cell;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use sparse_file::{CancelToken, Pass, Progress};

/// A progress function of the caller.
pub(crate) type Callback = Arc<Mutex<dyn FnMut(Progress) -> ControlFlow<()> + Send>>;

/// The caller's progress function and token.
#[derive(Clone, Default)]
pub(crate) struct Reporter {
    pub(crate) callback: Option<Callback>,
    pub(crate) cancel: CancelToken,
}

impl Reporter {
    /// Reports to the caller, who may cancel.
    pub(crate) fn report(&self, progress: Progress) -> ControlFlow<()> {
        let mut flow = ControlFlow::Continue(());
        if let Some(callback) = &self.callback {
            let mut callback = callback.lock().unwrap_or_else(PoisonError::into_inner);
            flow = callback(progress);
        }
        match flow.is_continue() {
            true => self.cancel.flow(),
            false => flow,
        }
    }

    /// Begins to count a write of `total` bytes.
    pub(crate) fn begin(&self, total: u64, pass: Pass) -> WriteProgress {
        WriteProgress {
            reporter: self.clone(),
            total,
            pass,
            written: Cell::new(0),
            skipped: Cell::new(0),
            cancelled: Cell::new(false),
        }
    }
}

/// Counts and reports the written and skipped bytes of one write. The file's writer and the
/// iterator that finds the runs share it, on one thread.
#[derive(Debug)]
pub(crate) struct WriteProgress {
    reporter: Reporter,
    total: u64,
    pass: Pass,
    written: Cell<u64>,
    skipped: Cell<u64>,
    cancelled: Cell<bool>,
}

impl WriteProgress {
    /// Reports that `bytes` were written so far.
    pub(crate) fn wrote(&self, bytes: u64) -> ControlFlow<()> {
        self.written.set(bytes);
        self.report()
    }

    /// Reports that `bytes` more are skipped.
    pub(crate) fn skipped(&self, bytes: u64) -> ControlFlow<()> {
        self.skipped.set(self.skipped.get() + bytes);
        self.report()
    }

    /// Returns whether the write was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    fn report(&self) -> ControlFlow<()> {
        let done = self.written.get() + self.skipped.get();
        let progress = Progress::new(done, self.total).in_pass(self.pass);
        let flow = self.reporter.report(progress);
        self.cancelled.set(flow.is_break());
        flow
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter")
            .field("callback", &self.callback.is_some())
            .field("cancel", &self.cancel)
            .finish()
    }
}
