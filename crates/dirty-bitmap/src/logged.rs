//! Epochs of a bitmap into which a hypervisor's dirty log is moved.

use std::sync::Arc;

use crate::bitmap::LoggedBitmap;
use crate::epoch::{BeginEpochError, Epoch, ExtendError};
use crate::extension::Extension;
use crate::kind::Logged;

/// The epoch of a [`LoggedBitmap`]: it takes marks only after a harvest, which moves the
/// hypervisor's log into the bitmap.
///
/// An epoch that begins before the harvest lacks the pages in the log, and the image that is
/// written from it lacks them too. Therefore the bitmap has no method that begins an epoch, and the
/// epoch has no method that extends it without a harvest:
/// ```compile_fail,E0599
/// # fn example(mut epoch: dirty_bitmap::LoggedEpoch) {
/// epoch.extend(); // of a LoggedEpoch
/// # }
/// ```
/// With KVM, `DirtyLog` and `PausedHarvest` of the crate `kvm-backend` make these calls.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use dirty_bitmap::{LoggedBitmap, LoggedEpoch};
///
/// type Error = Box<dyn std::error::Error>;
/// # fn read_log() -> Result<Vec<u64>, Error> { Ok(vec![0b101]) }
/// // Reads the log of the hypervisor.
/// let harvest = |bitmap: &Arc<LoggedBitmap>| -> Result<(), Error> {
///     bitmap.mark_dirty_log(0, 4096, &read_log()?)?;
///     Ok(())
/// };
///
/// let bitmap = Arc::new(LoggedBitmap::logged(0, 64 << 20, 4096)?);
/// let mut epoch = LoggedEpoch::begin_after(Arc::clone(&bitmap), harvest)?;
/// // ... write the pages of `epoch.bitmap()`, while the guest runs ...
/// let dirtied = epoch.extend_after(harvest)?; // the guest is paused
/// // ... write the pages of `dirtied` ...
/// assert_eq!(dirtied.dirty_pages(), 2);
/// epoch.release()?; // after the file is durable
/// # Ok::<(), Error>(())
/// ```
pub type LoggedEpoch = Epoch<Arc<LoggedBitmap>, Logged>;

impl LoggedEpoch {
    /// Calls `harvest`, and then takes all marks out of `bitmap`.
    ///
    /// `harvest` gets the bitmap, and [marks](crate::DirtyBitmap::mark_dirty_log) all pages of the
    /// hypervisor's log in it.
    ///
    /// # Errors
    /// Returns the error of `harvest`, or a [`BeginEpochError`]. No mark was taken.
    pub fn begin_after<E: From<BeginEpochError>>(
        bitmap: Arc<LoggedBitmap>,
        harvest: impl FnOnce(&Arc<LoggedBitmap>) -> Result<(), E>,
    ) -> Result<Self, E> {
        harvest(&bitmap)?;
        Ok(Self::begin_any_kind(bitmap)?)
    }

    /// Calls `harvest`, takes the marks that were set since the last take, adds them to this epoch,
    /// and returns only them.
    ///
    /// `harvest` gets the bitmap of this epoch, and marks all pages of the hypervisor's log in it.
    ///
    /// # Errors
    /// Returns the error of `harvest`, or an [`ExtendError`]. No mark was taken.
    pub fn extend_after<E: From<ExtendError>>(
        &mut self,
        harvest: impl FnOnce(&Arc<LoggedBitmap>) -> Result<(), E>,
    ) -> Result<Extension<'_>, E> {
        harvest(self.source())?;
        Ok(self.extend_any_kind()?)
    }
}
