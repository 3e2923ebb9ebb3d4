//! Live snapshots of guests of Apple's Hypervisor framework.

use std::sync::Arc;

use dirty_bitmap::{Extension, TrackedBitmap, TrackedEpoch, WriteProtection};
use hvf_backend::Stage2Tracker;
use page_reader::PageReader;

use crate::slot::{CaptureSlot, CopyOnWrite};
use crate::tracker::{CheckpointFailed, LiveTracker};

/// A [`Stage2Tracker`] whose protection copies pages before they are unprotected, with the RAM of
/// its guest.
///
/// A vCPU thread copies the page that its guest is about to overwrite, in
/// [`handle_exit`](Stage2Tracker::handle_exit).
///
/// # Host writes
/// Writes of the host and of its devices do not fault in stage 2. Each calls
/// [`before_write`](CaptureSlot::before_write) of the [`slot`](LiveTracker::slot) first, and
/// [`mark_host_write`](Stage2Tracker::mark_host_write) afterwards.
pub struct LiveStage2<P: WriteProtection> {
    tracker: Stage2Tracker<CopyOnWrite<P>>,
    memory: Arc<dyn PageReader + Send + Sync>,
}

impl<P: WriteProtection> std::fmt::Debug for LiveStage2<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveStage2").finish_non_exhaustive()
    }
}

impl<P: WriteProtection> LiveStage2<P> {
    /// Creates a live tracker. `memory` is the RAM that `tracker` tracks.
    pub fn new(
        tracker: Stage2Tracker<CopyOnWrite<P>>,
        memory: Arc<dyn PageReader + Send + Sync>,
    ) -> Self {
        Self { tracker, memory }
    }

    /// Returns the tracker, for the vCPU threads.
    pub fn tracker(&self) -> &Stage2Tracker<CopyOnWrite<P>> {
        &self.tracker
    }
}

impl<P: WriteProtection + Send + Sync + 'static> LiveTracker for LiveStage2<P> {
    fn memory(&self) -> Arc<dyn PageReader + Send + Sync> {
        Arc::clone(&self.memory)
    }

    fn bitmap(&self) -> &Arc<TrackedBitmap> {
        self.tracker.bitmap()
    }

    fn begin_epoch(&self) -> Result<TrackedEpoch, CheckpointFailed> {
        Ok(self.tracker.checkpoint_live()?)
    }

    fn extend_epoch<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, CheckpointFailed> {
        Ok(self.tracker.checkpoint_incremental(epoch)?)
    }

    fn freeze_epoch(
        &self,
        epoch: &mut TrackedEpoch,
        frozen: &mut dyn FnMut(&Extension<'_>),
    ) -> Result<(), CheckpointFailed> {
        Ok(self.tracker.checkpoint_final_with(epoch, frozen)?)
    }

    fn slot(&self) -> Option<&CaptureSlot> {
        Some(self.tracker.protection().slot())
    }
}
