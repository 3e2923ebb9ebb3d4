//! Epochs of logged RAM: each take of marks follows a harvest.

use std::sync::Arc;

use dirty_bitmap::{BeginEpochError, Extension, LoggedBitmap, LoggedEpoch};

use super::errors::LogEpochError;
use super::{DirtyLog, HarvestStats};
use crate::linux::ram::GuestRam;
use crate::linux::slots::RamSlots;
use crate::linux::vcpus::Paused;

/// The result of the last harvest of a paused guest. The vCPUs stay paused until the value is
/// dropped: drop it when the pages are copied.
///
/// [`begin_epoch`](Self::begin_epoch) takes the marks. They include the pages of the log, to which
/// no vCPU adds any while this value exists.
#[derive(Debug)]
#[must_use = "the vCPUs may run when this is dropped"]
pub struct PausedHarvest {
    stats: HarvestStats,
    slots: Arc<RamSlots>,
    _paused: Paused,
}

impl PausedHarvest {
    pub(super) fn new(stats: HarvestStats, slots: Arc<RamSlots>, paused: Paused) -> Self {
        Self {
            stats,
            slots,
            _paused: paused,
        }
    }

    /// Returns the numbers of the harvest.
    #[must_use]
    pub fn stats(&self) -> HarvestStats {
        self.stats
    }

    /// Takes all marks of the RAM, those of the harvest included.
    ///
    /// Host writes that are marked later are not in the epoch. Marks that are collected elsewhere,
    /// such as those of an `AtomicBitmap` of `vm-memory`, were moved into the bitmap by the
    /// harvest: see
    /// [`DirtyLogOptions::mark_host_writes`](crate::DirtyLogOptions::mark_host_writes).
    ///
    /// # Errors
    /// Returns [`BeginEpochError`] if another epoch is open: another save is in progress. No mark
    /// was taken.
    pub fn begin_epoch(&self) -> Result<LoggedEpoch, BeginEpochError> {
        let bitmap = Arc::clone(self.slots.ram().dirty_bitmap());
        // The harvest was made, and no vCPU has run since.
        LoggedEpoch::begin_after(bitmap, |_| Ok(()))
    }

    /// Takes the marks that were set since the last take, those of the harvest included, adds them
    /// to `epoch`, and returns only them: the last round of a save that began while the guest ran.
    ///
    /// # Errors
    /// Returns [`LogEpochError::OtherRam`] if the epoch is of other RAM, and
    /// [`LogEpochError::Extend`]. No mark was taken.
    pub fn extend<'e>(&self, epoch: &'e mut LoggedEpoch) -> Result<Extension<'e>, LogEpochError> {
        epoch.extend_after(|bitmap| check_same(self.slots.ram(), bitmap))
    }
}

impl DirtyLog {
    /// Harvests the log of the running guest, as [`harvest_live`](Self::harvest_live) does, and
    /// takes all marks.
    ///
    /// A page that the guest writes after the harvest is in no part of the epoch until
    /// [`extend_live`](Self::extend_live) or [`PausedHarvest::extend`] adds it. The pages are a
    /// consistent image only after the latter. [`Precopy`](crate::Precopy) makes these calls in the
    /// right order.
    ///
    /// The last harvest of an image must therefore be that of a pause. KVM writes guest memory when
    /// [`Vcpu::complete_io`](crate::Vcpu::complete_io) completes pending I/O, and may write it
    /// during a capture. An image whose only epoch began here, before these calls, lacks the pages.
    ///
    /// # Errors
    /// Returns [`LogEpochError::Harvest`], or [`LogEpochError::Begin`] if another epoch is open. No
    /// page is lost.
    pub fn begin_live_epoch(&self) -> Result<LoggedEpoch, LogEpochError> {
        let bitmap = Arc::clone(self.slots.ram().dirty_bitmap());
        LoggedEpoch::begin_after(bitmap, |_| Ok(self.harvest_live().map(drop)?))
    }

    /// Harvests the log of the running guest, takes the marks that were set since the last take,
    /// adds them to `epoch`, and returns only them.
    ///
    /// # Errors
    /// Returns [`LogEpochError::OtherRam`] if the epoch is of other RAM, and otherwise
    /// [`LogEpochError::Harvest`] or [`LogEpochError::Extend`]. No page is lost.
    pub fn extend_live<'e>(
        &self,
        epoch: &'e mut LoggedEpoch,
    ) -> Result<Extension<'e>, LogEpochError> {
        epoch.extend_after(|bitmap| {
            check_same(self.slots.ram(), bitmap)?;
            Ok(self.harvest_live().map(drop)?)
        })
    }
}

/// Checks that the bitmap of an epoch is that of the logged RAM.
fn check_same(ram: &GuestRam, bitmap: &Arc<LoggedBitmap>) -> Result<(), LogEpochError> {
    match Arc::ptr_eq(ram.dirty_bitmap(), bitmap) {
        true => Ok(()),
        false => Err(LogEpochError::OtherRam),
    }
}
