//! Progress of long operations, and their cancellation.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A function that an operation calls with its progress. It cancels the operation by returning
/// [`ControlFlow::Break`].
///
/// An operation may call it from several threads, one at a time. [`CancelToken::flow`] returns the
/// value for a token that another thread cancels.
pub type ProgressFn<'p> = dyn FnMut(Progress) -> ControlFlow<()> + Send + 'p;

/// The progress of an operation, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The number of bytes processed so far.
    pub done: u64,
    /// The number of bytes to process. At least `done`.
    pub total: u64,
    /// The part of the operation that the bytes belong to. Each pass begins at 0.
    pub pass: Pass,
}

/// A part of an operation, of which [`Progress`] counts the bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pass {
    /// The operation has no parts.
    #[default]
    Whole,
    /// A write of all of the RAM.
    Full,
    /// A write of some pages: a diff, or runs of pages.
    Pages,
    /// A write of pages that are zeros.
    Zeros,
    /// A comparison of an image with its checksums, before it is read for another image. The pass
    /// begins again for each image.
    Verify,
    /// A search for pages of zeros, before the other pages are written.
    FindZeros,
}

impl Progress {
    /// Creates a report of `done` bytes of `total` of a whole operation. If `done` is larger, it is
    /// the total too.
    #[must_use]
    pub fn new(done: u64, total: u64) -> Self {
        Self {
            done,
            total: total.max(done),
            pass: Pass::Whole,
        }
    }

    /// Returns the report as one of a pass of the operation.
    #[must_use]
    pub fn in_pass(self, pass: Pass) -> Self {
        Self { pass, ..self }
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
/// assert!(for_the_operation.flow().is_break()); // for a progress function
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

    /// Returns the value for a [progress function](ProgressFn): [`ControlFlow::Break`] if the token
    /// is cancelled.
    pub fn flow(&self) -> ControlFlow<()> {
        match self.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Returns a guard that cancels the token when it is dropped. An operation of another thread
    /// then also ends if this thread returns early or panics.
    ///
    /// # Examples
    /// ```
    /// use sparse_file::CancelToken;
    ///
    /// let token = CancelToken::new();
    /// let guard = token.clone().drop_guard();
    /// assert!(!token.is_cancelled());
    /// drop(guard);
    /// assert!(token.is_cancelled());
    /// ```
    pub fn drop_guard(self) -> CancelGuard {
        CancelGuard(Some(self))
    }
}

/// A guard that cancels a token when it is dropped, returned by [`CancelToken::drop_guard`].
#[derive(Debug)]
#[must_use = "the token is cancelled when this is dropped"]
pub struct CancelGuard(Option<CancelToken>);

impl CancelGuard {
    /// Returns the token, which is no longer cancelled by the guard.
    #[must_use]
    pub fn disarm(mut self) -> CancelToken {
        self.0.take().unwrap_or_default()
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        if let Some(token) = &self.0 {
            token.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_exceeds_its_total() {
        let progress = Progress::new(7, 5);
        assert_eq!((progress.done, progress.total), (7, 7));
        assert_eq!(Progress::new(3, 5).total, 5);
    }

    #[test]
    fn a_token_breaks_once_it_is_cancelled() {
        let token = CancelToken::new();
        assert!(token.flow().is_continue());
        token.clone().cancel();
        assert!(token.flow().is_break());
    }

    #[test]
    fn a_guard_cancels_its_token_unless_it_is_disarmed() {
        let token = CancelToken::new();
        let returned = token.clone().drop_guard().disarm();
        assert!(!token.is_cancelled());
        returned.cancel();
        assert!(token.is_cancelled(), "the same token is returned");

        let token = CancelToken::new();
        drop(token.clone().drop_guard());
        assert!(token.is_cancelled());
    }
}
