//! The options of a copy of a running guest.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use dirty_bitmap::LoggedBitmap;

use super::{Precopy, PrecopyError};
use crate::linux::dirty_log::DirtyLog;

type BoxError = Box<dyn Error + Send + Sync>;
type MarkFn = dyn Fn(&LoggedBitmap) -> Result<(), BoxError> + Send + Sync;

/// A builder for the copy of a running guest, returned by [`Precopy::options`].
#[derive(Clone, Default)]
#[must_use = "options do nothing until `begin`"]
pub struct PrecopyOptions {
    mark: Option<Arc<MarkFn>>,
}

impl PrecopyOptions {
    /// Calls `mark` before each take of marks: at the beginning, in each round, and in the pause.
    /// It gets the bitmap of the RAM, and marks the writes of the host that are not marked there as
    /// they are made.
    ///
    /// The devices must have stopped when the `pause` of [`finish`](Precopy::finish) returns. A
    /// write that they make after the last call is missing from the image, and its mark is in the
    /// next one.
    ///
    /// # Examples
    /// Guest memory of the crate `vm-memory` whose writes are marked in `AtomicBitmap`s:
    /// ```
    /// use std::sync::Arc;
    ///
    /// use kvm_backend::{DirtyLog, Precopy, PrecopyError};
    /// use vm_memory::GuestMemoryMmap;
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// fn begin(
    ///     log: &DirtyLog,
    ///     memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    /// ) -> Result<Precopy<'_>, PrecopyError> {
    ///     Precopy::options()
    ///         .mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&memory))
    ///         .begin(log)
    /// }
    /// ```
    pub fn mark_host_writes<T, E: Into<BoxError>>(
        mut self,
        mark: impl Fn(&LoggedBitmap) -> Result<T, E> + Send + Sync + 'static,
    ) -> Self {
        self.mark = Some(Arc::new(move |bitmap| {
            mark(bitmap).map(drop).map_err(Into::into)
        }));
        self
    }

    /// Harvests the log of the running guest, and takes all marks, as [`Precopy::begin`] does.
    ///
    /// # Errors
    /// Returns the errors of [`Precopy::begin`], and [`PrecopyError::HostWrites`].
    pub fn begin<'l>(&self, log: &'l DirtyLog) -> Result<Precopy<'l>, PrecopyError> {
        Precopy::begin_with(log, self.clone())
    }

    /// Returns whether there is a function that marks the writes of the host.
    pub(super) fn marks_host_writes(&self) -> bool {
        self.mark.is_some()
    }

    /// Marks the writes of the host.
    pub(super) fn mark(&self, bitmap: &LoggedBitmap) -> Result<(), PrecopyError> {
        match &self.mark {
            Some(mark) => mark(bitmap).map_err(PrecopyError::HostWrites),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for PrecopyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrecopyOptions")
            .field("mark_host_writes", &self.marks_host_writes())
            .finish()
    }
}
