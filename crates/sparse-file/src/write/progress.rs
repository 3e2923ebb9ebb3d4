//! Counts written bytes and checks for cancellation.

use std::fmt;
use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use super::error::WriteError;

/// Pause before a retry of a file that is not ready. The caller is polled before each retry, so
/// that a wait can be cancelled.
const NOT_READY_PAUSE: Duration = Duration::from_millis(1);

/// The caller's progress function. It is not called again after it returned [`ControlFlow::Break`].
pub(super) struct Progress<'p> {
    report: &'p mut dyn FnMut(u64) -> ControlFlow<()>,
    written: u64,
    cancelled: bool,
}

impl<'p> Progress<'p> {
    pub(super) fn new(report: &'p mut dyn FnMut(u64) -> ControlFlow<()>) -> Self {
        Self {
            report,
            written: 0,
            cancelled: false,
        }
    }

    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Adds `bytes` to the count and polls for cancellation.
    pub(super) fn advance(&mut self, bytes: u64) -> Result<(), WriteError> {
        self.written += bytes;
        self.poll()
    }

    /// Waits for a file that is not ready, and polls for cancellation.
    pub(super) fn wait(&mut self) -> Result<(), WriteError> {
        thread::sleep(NOT_READY_PAUSE);
        self.poll()
    }

    fn poll(&mut self) -> Result<(), WriteError> {
        self.cancelled = self.cancelled || (self.report)(self.written).is_break();
        if self.cancelled {
            return Err(WriteError::Cancelled {
                written: self.written,
            });
        }
        Ok(())
    }
}

impl fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("written", &self.written)
            .field("cancelled", &self.cancelled)
            .finish_non_exhaustive()
    }
}
