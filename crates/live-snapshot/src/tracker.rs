//! What a live snapshot needs of the tracker of a guest's writes.

use std::error::Error;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{Extension, TrackedBitmap, TrackedEpoch};
use page_reader::PageReader;

use crate::slot::CaptureSlot;

/// The error of a checkpoint: that of the tracker.
pub type CheckpointFailed = Box<dyn Error + Send + Sync>;

/// A tracker of a guest's writes, of which live snapshots can be taken.
///
/// Implemented by `UffdTracker` (Linux), and with the feature `hvf` by `Stage2Tracker` of the crate
/// `hvf-backend`. Offsets are bytes in the memory file.
pub trait LiveTracker: Send + Sync + 'static {
    /// Returns the RAM. It exposes the [memory](PageReader::host_memory) of all of it, or copies it
    /// on any thread.
    fn memory(&self) -> Arc<dyn PageReader + Send + Sync>;

    /// Returns the bitmap of the pages that were written since the last epoch.
    fn bitmap(&self) -> &Arc<TrackedBitmap>;

    /// Takes all marks into an epoch, and protects their pages, while the guest may run.
    ///
    /// # Errors
    /// Returns an error if another epoch is open or the protection failed. All marks are in the
    /// bitmap.
    fn begin_epoch(&self) -> Result<TrackedEpoch, CheckpointFailed>;

    /// Extends an epoch by the pages that were written since, and protects them, while the guest
    /// may run. Returns only these pages.
    ///
    /// # Errors
    /// Returns an error if the protection failed. Pages that could not be protected are marked for
    /// the next epoch too.
    fn extend_epoch<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, CheckpointFailed>;

    /// Extends an epoch as [`extend_epoch`](Self::extend_epoch) does, and calls `frozen` with its
    /// pages before another write fault is handled. The vCPUs are stopped.
    ///
    /// # Errors
    /// Returns the errors of [`extend_epoch`](Self::extend_epoch), and an error for a running vCPU
    /// if the tracker can tell. `frozen` was not called.
    fn freeze_epoch(
        &self,
        epoch: &mut TrackedEpoch,
        frozen: &mut dyn FnMut(&Extension<'_>),
    ) -> Result<(), CheckpointFailed>;

    /// Returns the place where a capture receives each write before the page is unprotected, or
    /// `None` if the tracker cannot call it then.
    fn slot(&self) -> Option<&CaptureSlot>;

    /// Returns whether all pages of a range that should be protected are protected, as far as the
    /// platform can say. A page that was discarded is not. The provided method returns `true`.
    ///
    /// # Errors
    /// Returns an error if the platform does not answer.
    fn is_protected(&self, range: Range<u64>) -> io::Result<bool> {
        let _ = range;
        Ok(true)
    }

    /// Returns the offset of a page of a range that was discarded unseen: it is neither protected
    /// nor marked. Called for a snapshot in progress before pages are unprotected. The provided
    /// method returns `None`.
    ///
    /// # Errors
    /// Returns an error if the platform does not answer.
    fn find_discarded(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        let _ = range;
        Ok(None)
    }

    /// Marks all pages that were discarded unseen: they are neither protected nor marked. Returns
    /// the offset of the first one. The provided method returns `None`.
    ///
    /// # Errors
    /// Returns an error if the platform does not answer, or writes are not tracked any more.
    fn mark_discarded(&self) -> Result<Option<u64>, CheckpointFailed> {
        Ok(None)
    }
}
