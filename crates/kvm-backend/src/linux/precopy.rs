//! Copies a running guest's RAM in rounds, in the order that loses no page.

use dirty_bitmap::{Extension, LoggedEpoch, TakenBitmap};

use super::dirty_log::{DirtyLog, LogEpochError};
use super::vcpus::Paused;

/// A copy of a running guest's RAM (pre-copy), whose steps are made in the order that loses no
/// page.
///
/// Most pages are copied while the guest runs, in [live rounds](Self::live_round). The guest then
/// pauses for the pages that it wrote since the last round only: [`finish`](Self::finish). A round
/// is worth its time as long as it finds fewer pages than the round before.
///
/// | step | who |
/// |---|---|
/// | harvest the log, take the marks, write their pages, repeat | `live_round`, and `write` |
/// | make the vCPUs leave the guest, complete their I/O, pause them | `pause` |
/// | capture their state | `capture` |
/// | harvest the log, take the last marks | `finish` |
/// | write their pages | `write` |
/// | let the vCPUs run | `finish` |
/// | commit the file, release the epoch | the caller, with the epoch that `finish` returns |
///
/// The epoch is available only after the last step. If the value is dropped, after an error or
/// because the save is cancelled, all marks return to the bitmap, and no page is lost.
///
/// The closures may fail with any error `E` that a [`PrecopyError`] converts to, such as
/// `Box<dyn Error>`.
///
/// # Writes of the host
/// Every device that writes guest memory must [mark its writes](crate#writes-of-the-host), and stop
/// in `pause`. The function of
/// [`DirtyLogOptions::mark_host_writes`](crate::DirtyLogOptions::mark_host_writes) is called in
/// each harvest, the last one in the pause included.
///
/// # Examples
/// ```
/// # #[cfg(target_arch = "x86_64")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::sync::Arc;
/// # use kvm_backend::{DirtyLog, GuestRam, RamSlots, Vcpus, create_vm, open_kvm};
/// # use page_reader::RamLayout;
/// # if !test_machine::Need::Kvm.met("the example of Precopy") { return Ok(()); }
/// use kvm_backend::{MsrList, Precopy, VcpuState};
///
/// # let kvm = open_kvm()?;
/// # let vm = create_vm(&kvm)?;
/// # let ram = Arc::new(GuestRam::new(RamLayout::single(0, 2 << 20)?)?);
/// # let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?);
/// # let vcpus = Vcpus::new(&vm)?;
/// # let vcpu = vcpus.create(&vm, 0)?;
/// # let log = DirtyLog::start(&slots)?;
/// let msrs = MsrList::query(&kvm)?; // once for each host
/// # type Error = Box<dyn std::error::Error>;
/// # let write = |pages: &kvm_backend::dirty_bitmap::TakenBitmap| Ok::<_, Error>(());
/// // `write` writes the pages of a bitmap: `writer.write_diff(&ram, pages)`.
/// let mut precopy = Precopy::begin(&log)?;
/// let mut found = u64::MAX;
/// for _ in 0..8 {
///     let before = found;
///     found = precopy.live_round::<Error>(write)?;
///     if found < 64 || found > before / 2 {
///         break;
///     }
/// }
/// let copy = precopy.finish::<_, Error>(
///     || Ok(vcpus.pause()?), // after each vCPU thread has called `complete_io`
///     |paused| Ok(VcpuState::capture(&msrs, paused, &vcpu)?),
///     write,
/// )?;
/// // The guest runs again. `writer.commit_and_release(copy.epoch)` commits the file.
/// copy.epoch.release()?;
/// # let _ = copy.state;
/// # Ok(())
/// # }
/// # #[cfg(not(target_arch = "x86_64"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
#[must_use = "all marks return to the bitmap when this is dropped"]
pub struct Precopy<'l> {
    log: &'l DirtyLog,
    epoch: LoggedEpoch,
    stage: Stage,
}

/// How far the pages of the epoch are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No page was written.
    Begun,
    /// All pages that were taken were written.
    Written,
    /// A write failed or panicked.
    Failed,
}

/// A finished copy of a guest's RAM, which is not yet committed.
#[derive(Debug)]
#[must_use = "all marks return to the bitmap when the epoch is dropped"]
#[non_exhaustive]
pub struct Precopied<T> {
    /// The state that `capture` returned.
    pub state: T,
    /// The epoch of all pages that were written: release it once the file is durable.
    pub epoch: LoggedEpoch,
    /// The number of pages of the bitmap that were written while the guest was paused.
    pub pages: u64,
}

impl<'l> Precopy<'l> {
    /// Harvests the log of the running guest, and takes all marks. The first round writes their
    /// pages: all of the RAM, if the log was just started.
    ///
    /// # Errors
    /// Returns [`PrecopyError::Epoch`]: with [`LogEpochError::Harvest`], or with
    /// [`LogEpochError::Begin`] if another epoch is open.
    pub fn begin(log: &'l DirtyLog) -> Result<Self, PrecopyError> {
        Ok(Self {
            log,
            epoch: log.begin_live_epoch()?,
            stage: Stage::Begun,
        })
    }

    /// Copies the pages that were written since the last round, while the guest runs. Returns the
    /// number of these pages, in pages of the bitmap.
    ///
    /// `write` gets the pages to write. The guest may write them at the same time, and then they
    /// are written again in a later round. The first call may write all of the RAM instead
    /// (`write_full`).
    ///
    /// # Errors
    /// Returns the error of `write`, after which every further call fails
    /// ([`PrecopyError::Failed`]), or another [`PrecopyError`]. No page is lost.
    pub fn live_round<E: From<PrecopyError>>(
        &mut self,
        write: impl FnOnce(&TakenBitmap) -> Result<(), E>,
    ) -> Result<u64, E> {
        let log = self.log;
        self.write_taken(|epoch| log.extend_live(epoch), write)
    }

    /// Pauses the guest, copies the pages that were written since the last round, and lets the
    /// guest run again.
    ///
    /// `pause` makes the vCPUs leave the guest, has each [completed](crate::Vcpu::complete_io), and
    /// returns [`Vcpus::pause`](crate::Vcpus::pause). `capture` captures the state of the vCPUs.
    /// `write` gets the pages to write. The vCPUs may run when this function returns.
    ///
    /// # Errors
    /// Returns the error of a closure, or a [`PrecopyError`]. The vCPUs may run, and all marks are
    /// back in the bitmap.
    pub fn finish<T, E: From<PrecopyError>>(
        mut self,
        pause: impl FnOnce() -> Result<Paused, E>,
        capture: impl FnOnce(&Paused) -> Result<T, E>,
        write: impl FnOnce(&TakenBitmap) -> Result<(), E>,
    ) -> Result<Precopied<T>, E> {
        self.check_written()?;
        let paused = pause()?;
        // The capture may make KVM write guest memory, so it precedes the harvest.
        let state = capture(&paused)?;
        let harvest = self.log.harvest(paused).map_err(of_epoch)?;
        if self.stage == Stage::Begun {
            // The pages of the first take and of this one, in one write.
            let _ = harvest.extend(&mut self.epoch).map_err(of_epoch)?;
        }
        let pages = self.write_taken(|epoch| harvest.extend(epoch), write)?;
        drop(harvest); // the vCPUs may run
        Ok(Precopied {
            state,
            epoch: self.epoch,
            pages,
        })
    }

    /// Writes what was not yet written, and returns the number of pages. If all pages of the epoch
    /// are written, it is extended first.
    fn write_taken<E: From<PrecopyError>>(
        &mut self,
        extend: impl FnOnce(&mut LoggedEpoch) -> Result<Extension<'_>, LogEpochError>,
        write: impl FnOnce(&TakenBitmap) -> Result<(), E>,
    ) -> Result<u64, E> {
        self.check_written()?;
        let pages = match self.stage {
            Stage::Begun => self.epoch.bitmap(),
            Stage::Written | Stage::Failed => extend(&mut self.epoch).map_err(of_epoch)?.bitmap(),
        };
        // Until `write` has returned, these pages are in the epoch and in no file.
        self.stage = Stage::Failed;
        write(pages)?;
        self.stage = Stage::Written;
        Ok(pages.dirty_pages())
    }

    fn check_written(&self) -> Result<(), PrecopyError> {
        match self.stage {
            Stage::Begun | Stage::Written => Ok(()),
            Stage::Failed => Err(PrecopyError::Failed),
        }
    }
}

fn of_epoch(error: impl Into<LogEpochError>) -> PrecopyError {
    PrecopyError::Epoch(error.into())
}

/// An error of copying a running guest's RAM. No page is lost: all marks return to the bitmap when
/// the [`Precopy`] is dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrecopyError {
    /// KVM's log could not be harvested, or the marks could not be taken: another save is in
    /// progress.
    #[error(transparent)]
    Epoch(#[from] LogEpochError),
    /// An earlier write failed.
    #[error(
        "pages of an earlier round were not written: drop this copy, which marks its pages again, \
         and begin another to a new file"
    )]
    Failed,
}
