//! Progress of long operations, and their cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The progress of an operation, in bytes.
///
/// An operation that reports progress calls a function `FnMut(Progress) -> ControlFlow<()>`, which
/// cancels the operation by returning [`ControlFlow::Break`](std::ops::ControlFlow::Break).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The number of bytes processed so far.
    pub done: u64,
    /// The number of bytes to process. At least `done`.
    pub total: u64,
}

impl Progress {
    /// Creates a report of `done` bytes of `total`. If `done` is larger, it is the total too.
    #[must_use]
    pub fn new(done: u64, total: u64) -> Self {
        Self {
            done,
            total: total.max(done),
        }
    }
}

/// A token that cancels operations from another thread. All clones share one state.
///
/// # Examples
/// ```
/// use sparse_file::CancelToken;
///
/// let token = CancelToken::new();
/// let for_the_operation = token.clone();
/// token.cancel();
/// assert!(for_the_operation.is_cancelled());
/// ```
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

#[cfg(test)]
mod tests {
    use super::Progress;

    #[test]
    fn progress_never_exceeds_its_total() {
        let progress = Progress::new(7, 5);
        assert_eq!((progress.done, progress.total), (7, 7));
        assert_eq!(Progress::new(3, 5).total, 5);
    }
}
