//! What is written so far, and the caller's say in whether to go on.

use std::fmt;
use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use super::WriteError;

/// How long a file that isn't ready is left alone; the caller is asked each time, so a wait can be cancelled.
const NOT_READY_PAUSE: Duration = Duration::from_millis(1);

/// The caller's progress function, which is not called again once it said [`ControlFlow::Break`].
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

    /// Counts `bytes` more and asks whether to go on.
    pub(super) fn wrote(&mut self, bytes: u64) -> Result<(), WriteError> {
        self.written += bytes;
        self.go_on()
    }

    /// Waits for a file that is not ready, and asks whether to go on.
    pub(super) fn wait(&mut self) -> Result<(), WriteError> {
        thread::sleep(NOT_READY_PAUSE);
        self.go_on()
    }

    fn go_on(&mut self) -> Result<(), WriteError> {
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
