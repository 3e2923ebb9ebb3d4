//! Starting a guest from memory that already has its contents.

use std::sync::Arc;

use dirty_bitmap::{NotReleased, Policy};
use guest_ram::{GuestRamError, RamOwner};
use page_reader::RamLayout;
use thiserror::Error;

use super::stage2::{MapError, ProtectError, Stage2};
use super::vm::Vm;
use crate::ram::GuestRam;
use crate::tracker::{Stage2CheckpointError, Stage2Tracker, Stage2TrackerError};

impl Stage2 {
    /// Maps the memory of `owner` into the guest, and tracks the guest's writes from the first one
    /// on. The [image](RamOwner::image) of `owner` is the parent of the next diff. The owner is
    /// dropped after the RAM.
    ///
    /// An owner is for example a `MappedImage` or a `MappedChain` of the crate `memory-image`. The
    /// guest then starts before the snapshot is read: the host reads each page when it is touched.
    ///
    /// Each first write is a fault that the tracker handles. A guest that is not going to be saved
    /// soon does without them: [`Stage2::map`].
    ///
    /// # Errors
    /// Returns [`StartError`]. Nothing is mapped into the guest.
    ///
    /// # Examples
    /// ```no_run
    /// use dirty_bitmap::Policy;
    /// use hvf_backend::{Stage2, Vm};
    /// # use hvf_backend::guest_ram::RamOwner;
    /// # use page_reader::RamLayout;
    /// # fn start(image: impl RamOwner) -> Result<(), Box<dyn std::error::Error>> {
    ///
    /// // let image = memory_image::MappedImage::open("guest.mem")?;
    /// let vm = Vm::new()?;
    /// let layout = RamLayout::single(0x8000_0000, 1 << 30)?;
    /// let tracker = Stage2::start(&vm, layout, image, Policy::default())?;
    /// // ... create and restore the vCPUs, run them ...
    /// let epoch = tracker.checkpoint()?; // the pages that were written since the image
    /// # Ok(())
    /// # }
    /// ```
    pub fn start(
        vm: &Vm,
        layout: RamLayout,
        owner: impl RamOwner,
        policy: Policy,
    ) -> Result<Stage2Tracker<Self>, StartError> {
        let ram = Arc::new(GuestRam::from_owner(layout, owner)?);
        let tracker = Self::map(vm, &ram)?.track(policy)?;
        // Protects every page, and takes the marks of all of them. The image of the owner stays
        // the parent of the next diff.
        let mut epoch = tracker.checkpoint().map_err(StartError::Protect)?;
        epoch.set_image(ram.dirty_bitmap().parent());
        epoch.release()?;
        ram.mark_owner_writes();
        Ok(tracker)
    }
}

/// An error for starting a guest from memory that already has its contents. Nothing is mapped into
/// the guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The memory of the owner is not RAM of this layout.
    #[error("failed to start from mapped memory: {0}")]
    Ram(#[from] GuestRamError),
    /// The RAM could not be mapped into the guest.
    #[error("failed to start from mapped memory: {0}")]
    Map(#[from] MapError),
    /// The RAM can't be tracked.
    #[error("failed to start from mapped memory: {0}")]
    Track(#[from] Stage2TrackerError),
    /// The RAM could not be protected.
    #[error("failed to protect the RAM of a guest that starts: {0}")]
    Protect(#[source] Stage2CheckpointError<ProtectError>),
    /// The first epoch was reclaimed, which only a caller with the bitmap can do.
    #[error("failed to make mapped memory the baseline: {0}")]
    Baseline(#[from] NotReleased),
}
