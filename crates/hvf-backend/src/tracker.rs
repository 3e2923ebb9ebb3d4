//! Answers the write faults of a guest, and protects again at checkpoints.

mod errors;
mod vcpus;

use std::fmt;
use std::sync::Arc;

use dirty_bitmap::{
    EpochCommitting, Policy, TakenBitmap, TrackedBitmap, TrackedEpoch, WriteProtection,
    WriteTracker,
};
use page_reader::{OutsideRam, RamLayout};

pub use errors::{ArmError, FaultError, TrackError};
pub use vcpus::InGuest;

use crate::syndrome::Access;
use crate::{Exception, Exit};
use vcpus::Vcpus;

/// Knows what a guest writes, by write-protecting its RAM in stage 2.
///
/// It translates between guest-physical addresses and the offsets that a [`WriteTracker`] works with, knows a write fault among a
/// guest's exits, and knows when the guest is stopped. `P` is what protects: `Stage2` on a Mac.
///
/// # vCPU threads
/// Each turn is counted from [`enter`](Self::enter) on, and the exit goes to [`handle_exit`](Self::handle_exit) first. After
/// [`Handled`](Answer::Handled) the vCPU runs again as it stands: the program counter stays, the write is tried again.
/// ```
/// # use std::{convert::Infallible, ops::Range, sync::Arc};
/// # use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection};
/// # use page_reader::RamLayout;
/// use hvf_backend::{Answer, Exception, Exit, Stage2Tracker};
/// # struct Nothing;
/// # impl WriteProtection for Nothing {
/// #     type Error = Infallible;
/// #     fn protect(&self, _: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// #     fn lift(&self, _: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// # }
/// # let stage2 = Nothing;
/// # let mut exits = [(0x9200_004f, 0x8012_3456), (0x5a00_0000, 0)].into_iter();
/// # let mut run = || exits.next().map(|(syndrome, physical_address)| {
/// #     Exit::Exception(Exception { syndrome, physical_address, ..Exception::default() })
/// # });
///
/// let layout = RamLayout::single(0x8000_0000, 64 << 20)?;
/// let bitmap = Arc::new(TrackedBitmap::tracked(0, layout.ram_size(), 16 << 10)?);
/// let tracker = Stage2Tracker::new(layout, &bitmap, Policy::default(), stage2)?;
/// tracker.arm()?.release()?; // a full save goes between the two
///
/// loop {
///     let in_guest = tracker.enter();
///     # let Some(exit) = run() else { break };
///     # /*
///     let exit = vcpu.run()?;
///     # */
///     if tracker.handle_exit(&in_guest, &exit)? == Answer::Handled {
///         continue;
///     }
///     drop(in_guest);
///     // a hypercall, a device, ...
/// }
/// assert!(bitmap.is_dirty(0x12_3456)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// # Saves
/// With the guest stopped: [`arm`](Self::arm), copy the pages of the epoch, let the guest go on, and release the epoch once they are durable. With a shorter
/// pause: [`arm_running`](Self::arm_running) and [`arm_more`](Self::arm_more) while the guest runs and most is copied, then stop it for
/// [`arm_last`](Self::arm_last).
///
/// # Host writes
/// They don't fault. Each is followed by [`mark_host_write`](Self::mark_host_write) or marked in the bitmap otherwise (`GuestRam` does for its own).
pub struct Stage2Tracker<P> {
    layout: RamLayout,
    tracker: WriteTracker,
    protection: P,
    vcpus: Vcpus,
}

/// Whose an exit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an exit that is not the tracker's is the monitor's"]
pub enum Answer {
    /// A write to tracked RAM: it is marked and open. Run the vCPU again as it stands.
    Handled,
    /// Something else, for the monitor: a device's address, a hypercall, a fetch.
    NotOurs,
}

impl<P: WriteProtection> Stage2Tracker<P> {
    /// Tracks the RAM of this layout in pages of the bitmap's page size: at least the granule of stage 2, 16 KiB or 4 KiB. The
    /// bitmap covers the memory file, from 0 on. All of it is marked, and nothing protected, until the first checkpoint.
    ///
    /// It is to be the bitmap that the host's writes are marked in, or each is told by [`mark_host_write`](Self::mark_host_write): a
    /// write that is marked elsewhere is in no save. `Stage2::track` takes that of its RAM.
    ///
    /// # Errors
    /// [`TrackError`]. Nothing was marked.
    pub fn new(
        layout: RamLayout,
        bitmap: &Arc<TrackedBitmap>,
        policy: Policy,
        protection: P,
    ) -> Result<Self, TrackError> {
        let ram = (bitmap.ram_start(), bitmap.ram_size());
        if ram != (0, layout.ram_size()) {
            return Err(TrackError::BitmapMismatch {
                bitmap_start: ram.0,
                bitmap_size: ram.1,
                ram_size: layout.ram_size(),
            });
        }
        let page_size = bitmap.page_size();
        let aligned = |start: u64, size: u64| (start | size).is_multiple_of(page_size);
        let mut regions = layout.regions().iter();
        if let Some(region) = regions.find(|region| !aligned(region.guest_start, region.size)) {
            return Err(TrackError::MisalignedRegion {
                guest_start: region.guest_start,
                size: region.size,
                page_size,
            });
        }
        Ok(Self {
            layout,
            tracker: WriteTracker::new(Arc::clone(bitmap), policy)?,
            protection,
            vcpus: Vcpus::default(),
        })
    }

    /// Where the RAM is.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The marks, by offset in the memory file. To be rebuilt no finer than stage 2 protects.
    #[must_use]
    pub fn bitmap(&self) -> &Arc<TrackedBitmap> {
        self.tracker.bitmap()
    }

    /// What protects.
    #[must_use]
    pub fn protection(&self) -> &P {
        &self.protection
    }

    /// Counts a vCPU as in the guest, until the token is dropped. Waits while [`arm`](Self::arm) or [`arm_last`](Self::arm_last) is at work; otherwise
    /// one atomic update.
    pub fn enter(&self) -> InGuest<'_> {
        self.vcpus.enter()
    }

    /// Answers an exit, if it is a write to the RAM or [may be one](Access::may_write): opens the page or its block, then marks it.
    ///
    /// The vCPU counts as in the guest until then: a checkpoint of a stopped guest can't come between its exit and the answer.
    /// ```compile_fail,E0061
    /// # fn example<P: dirty_bitmap::WriteProtection>(tracker: &hvf_backend::Stage2Tracker<P>, exit: &hvf_backend::Exit) {
    /// tracker.handle_exit(exit); // of a vCPU that was not counted
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`FaultError`]: the page could not be opened. The vCPU must not go on, or it faults again at once.
    pub fn handle_exit(
        &self,
        _in_guest: &InGuest<'_>,
        exit: &Exit,
    ) -> Result<Answer, FaultError<P::Error>> {
        let Exit::Exception(Exception {
            syndrome,
            physical_address,
            ..
        }) = *exit
        else {
            return Ok(Answer::NotOurs);
        };
        let write = Access::of(syndrome).is_some_and(Access::may_write);
        if !write || self.layout.offset_of(physical_address).is_none() {
            return Ok(Answer::NotOurs);
        }
        self.on_write_fault(physical_address)?;
        Ok(Answer::Handled)
    }

    /// Answers a write fault at a guest-physical address, however it was learnt of. The write may go on when this has returned.
    ///
    /// # Errors
    /// [`FaultError`]: not RAM, or the page could not be opened. The write must not go on.
    pub fn on_write_fault(&self, guest_address: u64) -> Result<(), FaultError<P::Error>> {
        let offset = self
            .layout
            .offset_of(guest_address)
            .ok_or(FaultError::OutsideRam { guest_address })?;
        // Counted although its own vCPU has left: what is open before it is marked, others may write, and a checkpoint must not come between.
        let _in_guest = self.vcpus.enter();
        self.tracker.on_write_fault(offset, &self.protection)?;
        Ok(())
    }

    /// Marks `len` bytes that the host or a device wrote to guest-physical memory. To be called after the write: marked before, a save could take
    /// the mark and copy the old bytes.
    ///
    /// # Errors
    /// [`OutsideRam`] where any byte is not RAM: nothing is marked.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the bitmap covers the RAM: checked when the tracker is made"
    )]
    pub fn mark_host_write(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            let marked = self.bitmap().set_range(piece.offset, piece.size);
            assert!(
                marked.is_ok(),
                "the bitmap covers the RAM: checked when made"
            );
        }
        Ok(())
    }

    /// A checkpoint of a guest that is stopped: takes all marks into an epoch, and protects their pages. The guest is to stay stopped until they are
    /// copied, so that the copy is of one moment.
    ///
    /// # Errors
    /// [`ArmError`]: a vCPU is in the guest or its exit not handled yet, another save is under way, or the protection failed. All marks are in
    /// the bitmap, and a page that is open is among them.
    pub fn arm(&self) -> Result<TrackedEpoch, ArmError<P::Error>> {
        let _stopped = self.vcpus.stop().map_err(ArmError::running)?;
        self.arm_running()
    }

    /// A checkpoint of a guest that may run: each page of the epoch may be copied at once, and is of some moment since.
    ///
    /// # Errors
    /// As [`arm`](Self::arm), whatever the vCPUs do.
    pub fn arm_running(&self) -> Result<TrackedEpoch, ArmError<P::Error>> {
        Ok(self.tracker.arm(&self.protection)?)
    }

    /// Adds what was written since to the epoch of a save under way, with the guest running, and says what that is.
    ///
    /// # Errors
    /// As [`arm_running`](Self::arm_running). What could not be protected is marked for the next epoch too.
    pub fn arm_more<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<&'e TakenBitmap, ArmError<P::Error>> {
        Ok(self.tracker.arm_more(epoch, &self.protection)?)
    }

    /// The same with the guest stopped: with these pages copied as well, the save is of one moment.
    ///
    /// # Errors
    /// As [`arm`](Self::arm). What could not be protected is marked for the next epoch too.
    pub fn arm_last<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<&'e TakenBitmap, ArmError<P::Error>> {
        let _stopped = self.vcpus.stop().map_err(ArmError::running)?;
        self.arm_more(epoch)
    }

    /// Takes the marks of the open epoch back, and says whether there was one: for an epoch that was leaked, or whose save is stuck. See
    /// [`WriteTracker::reclaim_epoch`].
    ///
    /// # Errors
    /// [`EpochCommitting`] while the save commits.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.tracker.reclaim_epoch()
    }

    /// Ends the tracking: lifts the protection of all of the RAM, and gives back what protected.
    ///
    /// # Errors
    /// What the platform says: some of the RAM may still be protected.
    pub fn stop(self) -> Result<P, P::Error> {
        self.protection.lift(0..self.layout.ram_size())?;
        Ok(self.protection)
    }
}

impl<P: fmt::Debug> fmt::Debug for Stage2Tracker<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage2Tracker")
            .field("layout", &self.layout)
            .field("tracker", &self.tracker)
            .field("protection", &self.protection)
            .finish_non_exhaustive()
    }
}
