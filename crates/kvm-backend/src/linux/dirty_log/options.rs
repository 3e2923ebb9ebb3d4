//! The options of a dirty log.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use dirty_bitmap::LoggedBitmap;

use super::errors::{HarvestError, StartError};
use super::{DirtyLog, Reprotect};
use crate::linux::slots::RamSlots;

type BoxError = Box<dyn Error + Send + Sync>;
type MarkFn = dyn Fn(&LoggedBitmap) -> Result<(), BoxError> + Send + Sync;

/// A builder for a dirty log, returned by [`DirtyLog::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `start`"]
pub struct DirtyLogOptions {
    reprotect: Option<Reprotect>,
    host_writes: HostWrites,
}

impl DirtyLogOptions {
    /// Calls `mark` in each harvest, after the pages of KVM's log are marked. It gets the bitmap of
    /// the RAM, and marks the writes of the host that are not marked there as they are made.
    ///
    /// Each take of marks follows a harvest ([`DirtyLog::harvest`], [`DirtyLog::begin_live_epoch`],
    /// [`DirtyLog::extend_live`], [`Precopy`](crate::Precopy)), and therefore includes these marks.
    /// Devices must have stopped before the harvest of a pause. A write that they make after it is
    /// missing from the image, and its mark is in the next one.
    ///
    /// Harvests wait for `mark`, which must not harvest this log.
    ///
    /// # Examples
    /// Guest memory of the crate `vm-memory` whose writes are marked in `AtomicBitmap`s:
    /// ```
    /// use std::sync::Arc;
    ///
    /// use kvm_backend::{DirtyLog, RamSlots, StartError};
    /// use vm_memory::GuestMemoryMmap;
    /// use vm_memory::bitmap::AtomicBitmap;
    ///
    /// fn start(
    ///     slots: &Arc<RamSlots>,
    ///     memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    /// ) -> Result<DirtyLog, StartError> {
    ///     DirtyLog::options()
    ///         .mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&memory))
    ///         .start(slots)
    /// }
    /// ```
    pub fn mark_host_writes<T, E: Into<BoxError>>(
        mut self,
        mark: impl Fn(&LoggedBitmap) -> Result<T, E> + Send + Sync + 'static,
    ) -> Self {
        self.host_writes.mark = Some(Arc::new(move |bitmap| {
            mark(bitmap).map(drop).map_err(Into::into)
        }));
        self
    }

    /// Sets the time at which KVM protects logged pages again, for the whole virtual machine.
    ///
    /// The default is the best that this KVM offers.
    pub fn reprotect(mut self, reprotect: Reprotect) -> Self {
        self.reprotect = Some(reprotect);
        self
    }

    /// Switches the log on for every slot, as [`DirtyLog::start`] does.
    ///
    /// # Errors
    /// Returns the errors of [`DirtyLog::start`], and [`StartError::NoManualProtect`].
    pub fn start(&self, slots: &Arc<RamSlots>) -> Result<DirtyLog, StartError> {
        DirtyLog::start_with(slots, self.reprotect, self.host_writes.clone())
    }
}

/// The function that marks the writes of the host.
#[derive(Clone, Default)]
pub(super) struct HostWrites {
    mark: Option<Arc<MarkFn>>,
}

impl HostWrites {
    /// Returns whether there is a function.
    pub(super) fn are_marked(&self) -> bool {
        self.mark.is_some()
    }

    /// Marks the writes of the host.
    pub(super) fn mark(&self, bitmap: &LoggedBitmap) -> Result<(), HarvestError> {
        match &self.mark {
            Some(mark) => mark(bitmap).map_err(HarvestError::HostWrites),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWrites")
            .field("are_marked", &self.are_marked())
            .finish()
    }
}
