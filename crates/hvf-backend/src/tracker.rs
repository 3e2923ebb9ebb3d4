//! The tracker of a guest's writes: handling its write faults, and checkpoints.

mod errors;
mod vcpus;

use std::fmt;
use std::sync::Arc;

use dirty_bitmap::{
    EpochCommitting, Extension, Policy, TrackedBitmap, TrackedEpoch, WriteProtection, WriteTracker,
};
use guest_ram::{BitmapMismatch, MisalignedRegion};
use page_reader::{OutsideRam, RamLayout};

pub use errors::{Stage2CheckpointError, Stage2FaultError, Stage2TrackerError};
pub use vcpus::RunGuard;

use crate::exit::{Exception, Exit};
use crate::syndrome::Access;
use vcpus::Vcpus;

/// A tracker of a guest's writes by write-protecting its RAM in stage 2.
///
/// It translates between guest-physical addresses and the offsets of a [`WriteTracker`], recognizes
/// write faults among the guest's exits, and checks that the guest is stopped. `P` is the write
/// protection, which is `Stage2` on a Mac.
///
/// # vCPU threads
/// Call [`enter`](Self::enter) before each run of a vCPU, and pass the exit to
/// [`handle_exit`](Self::handle_exit) first. After [`Resume`](ExitAction::Resume), run the vCPU
/// again without changes. The program counter is unchanged, so the guest repeats the write.
/// ```
/// # use std::{convert::Infallible, ops::Range, sync::Arc};
/// # use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection};
/// # use page_reader::RamLayout;
/// use hvf_backend::{Exception, Exit, ExitAction, Stage2Tracker};
/// # struct NoProtection;
/// # impl WriteProtection for NoProtection {
/// #     type Error = Infallible;
/// #     fn protect(&self, _: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// #     fn unprotect(&self, _: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// # }
/// # let stage2 = NoProtection;
/// # let mut exits = [(0x9200_004f, 0x8012_3456), (0x5a00_0000, 0)].into_iter();
/// # let mut run = || exits.next().map(|(syndrome, physical_address)| {
/// #     Exit::Exception(Exception { syndrome, physical_address, ..Exception::default() })
/// # });
///
/// let layout = RamLayout::single(0x8000_0000, 64 << 20)?;
/// let bitmap = Arc::new(TrackedBitmap::tracked(0, layout.ram_size(), 16 << 10)?);
/// let tracker = Stage2Tracker::new(layout, &bitmap, Policy::default(), stage2)?;
/// tracker.checkpoint()?.release()?; // a full save goes between the two
///
/// loop {
///     let run_guard = tracker.enter();
///     # let Some(exit) = run() else { break };
///     # /*
///     let exit = vcpu.run()?;
///     # */
///     if tracker.handle_exit(&run_guard, &exit)? == ExitAction::Resume {
///         continue;
///     }
///     drop(run_guard);
///     // a hypercall, a device, ...
/// }
/// assert!(bitmap.is_dirty(0x12_3456)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// # Saves
/// With a stopped guest: call [`checkpoint`](Self::checkpoint), copy the pages of the epoch, resume
/// the guest, and release the epoch once the pages are durable.
///
/// With a shorter pause: call [`checkpoint_live`](Self::checkpoint_live) and
/// [`checkpoint_incremental`](Self::checkpoint_incremental) and copy most pages while the guest
/// runs, then stop it for [`checkpoint_final`](Self::checkpoint_final).
///
/// # Host writes
/// Host writes don't fault. After each, call [`mark_host_write`](Self::mark_host_write) or mark the
/// pages in the bitmap. `GuestRam` marks its own writes.
#[must_use = "a tracker that is dropped handles no fault"]
pub struct Stage2Tracker<P> {
    layout: RamLayout,
    tracker: WriteTracker,
    protection: P,
    vcpus: Vcpus,
}

/// The VMM's next step for an exit that it has passed to the tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an exit that the tracker did not handle must be handled by the VMM"]
pub enum ExitAction {
    /// The exit was a write to tracked RAM. The page is unprotected and marked. Run the vCPU again
    /// without changes.
    Resume,
    /// The exit was something else, such as a device access, a hypercall or a fetch. The VMM
    /// handles it.
    Forward,
}

impl<P: WriteProtection> Stage2Tracker<P> {
    /// Creates a tracker of the RAM of `layout`, in pages of the bitmap's page size.
    ///
    /// The page size is at least the granule of stage 2, 16 KiB or 4 KiB. The bitmap covers the
    /// memory file, from offset 0 on. Until the first checkpoint, all of it is marked and no page
    /// is protected.
    ///
    /// Mark the host's writes in this bitmap, or pass each to
    /// [`mark_host_write`](Self::mark_host_write). A write that is marked in another bitmap is in
    /// no save. `Stage2::track` uses the bitmap of its RAM.
    ///
    /// # Errors
    /// Returns [`Stage2TrackerError`]. No page was marked.
    pub fn new(
        layout: RamLayout,
        bitmap: &Arc<TrackedBitmap>,
        policy: Policy,
        protection: P,
    ) -> Result<Self, Stage2TrackerError> {
        let ram = (bitmap.ram_start(), bitmap.ram_size());
        if ram != (0, layout.ram_size()) {
            let (bitmap_start, bitmap_size) = ram;
            let mismatch = BitmapMismatch {
                bitmap_start,
                bitmap_size,
                ram_size: layout.ram_size(),
            };
            return Err(mismatch.into());
        }
        let page_size = bitmap.page_size();
        let aligned = |start: u64, size: u64| (start | size).is_multiple_of(page_size);
        let mut regions = layout.regions().iter();
        if let Some(region) = regions.find(|region| !aligned(region.guest_start, region.size)) {
            let misaligned = MisalignedRegion {
                guest_start: region.guest_start,
                size: region.size,
                page_size,
            };
            return Err(misaligned.into());
        }
        Ok(Self {
            layout,
            tracker: WriteTracker::new(Arc::clone(bitmap), policy)?,
            protection,
            vcpus: Vcpus::default(),
        })
    }

    /// Returns the layout of the RAM.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the bitmap, which covers the offsets of the memory file. Do not rebuild it with a
    /// granule finer than that of stage 2.
    #[must_use]
    pub fn bitmap(&self) -> &Arc<TrackedBitmap> {
        self.tracker.bitmap()
    }

    /// Returns the write protection.
    #[must_use]
    pub fn protection(&self) -> &P {
        &self.protection
    }

    /// Counts a vCPU as running in the guest until the returned guard is dropped.
    ///
    /// This waits while [`checkpoint`](Self::checkpoint) or
    /// [`checkpoint_final`](Self::checkpoint_final) protects pages. Otherwise it is one atomic
    /// update.
    pub fn enter(&self) -> RunGuard<'_> {
        self.vcpus.enter()
    }

    /// Handles an exit if it is a write to the RAM or [may be one](Access::may_write): unprotects
    /// the page or its block, then marks it.
    ///
    /// The vCPU counts as running until the exit is handled. Therefore a checkpoint of a stopped
    /// guest can't run between the exit and its handling.
    /// ```compile_fail,E0061
    /// # use hvf_backend::{Exit, Stage2Tracker};
    /// # fn example<P: dirty_bitmap::WriteProtection>(tracker: &Stage2Tracker<P>, exit: &Exit) {
    /// tracker.handle_exit(exit); // the vCPU was not counted
    /// # }
    /// ```
    ///
    /// # Errors
    /// Returns [`Stage2FaultError`] if the page could not be unprotected. The vCPU must not resume,
    /// because it would fault again at once.
    pub fn handle_exit(
        &self,
        _running: &RunGuard<'_>,
        exit: &Exit,
    ) -> Result<ExitAction, Stage2FaultError<P::Error>> {
        let Exit::Exception(Exception {
            syndrome,
            physical_address,
            ..
        }) = *exit
        else {
            return Ok(ExitAction::Forward);
        };
        let write = Access::of(syndrome).is_some_and(Access::may_write);
        if !write || self.layout.offset_of(physical_address).is_none() {
            return Ok(ExitAction::Forward);
        }
        self.on_write_fault(physical_address)?;
        Ok(ExitAction::Resume)
    }

    /// Handles a write fault at a guest-physical address. The write may resume after this returns.
    ///
    /// This is for faults that are not reported as an [`Exit`].
    ///
    /// # Errors
    /// Returns [`Stage2FaultError`] if the address is not RAM or the page could not be unprotected.
    /// The write must not resume.
    pub fn on_write_fault(&self, guest_address: u64) -> Result<(), Stage2FaultError<P::Error>> {
        let offset = self
            .layout
            .offset_of(guest_address)
            .ok_or(Stage2FaultError::OutsideRam { guest_address })?;
        // This counts as a running vCPU, even if the vCPU itself has left the guest. Otherwise a
        // checkpoint could run after the page was unprotected, when other vCPUs may write it, and
        // before it is marked.
        let _running = self.vcpus.enter();
        self.tracker.on_write_fault(offset, &self.protection)?;
        Ok(())
    }

    /// Marks `len` bytes that the host or a device wrote to guest-physical memory.
    ///
    /// Call this after the write. If the mark came first, a save could take it and copy the old
    /// bytes.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. No page was marked.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the bitmap covers the RAM: checked when the tracker is created"
    )]
    pub fn mark_host_write(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            let marked = self.bitmap().mark_range(piece.offset, piece.size);
            assert!(
                marked.is_ok(),
                "the bitmap covers the RAM: checked in `new`"
            );
        }
        Ok(())
    }

    /// Makes a checkpoint of a stopped guest: takes all marks into an epoch, and protects their
    /// pages.
    ///
    /// Keep the guest stopped until the pages are copied, so that the image is of one point in
    /// time.
    ///
    /// # Errors
    /// Returns [`Stage2CheckpointError`] if a vCPU is running or its exit is not handled yet, if
    /// another save is in progress, or if the protection failed. All marks are in the bitmap,
    /// including those of all unprotected pages.
    pub fn checkpoint(&self) -> Result<TrackedEpoch, Stage2CheckpointError<P::Error>> {
        let _stopped = self
            .vcpus
            .stop()
            .map_err(Stage2CheckpointError::vcpu_running)?;
        self.checkpoint_live()
    }

    /// Makes a checkpoint of a guest that may run.
    ///
    /// Each page of the epoch may be copied at once. Its contents are from some point in time after
    /// the checkpoint.
    ///
    /// # Errors
    /// Returns the same errors as [`checkpoint`](Self::checkpoint), except for a running vCPU.
    pub fn checkpoint_live(&self) -> Result<TrackedEpoch, Stage2CheckpointError<P::Error>> {
        Ok(self.tracker.checkpoint(&self.protection)?)
    }

    /// Extends the epoch of a save in progress by the pages written since, while the guest may run.
    /// Returns only these pages.
    ///
    /// # Errors
    /// Returns the same errors as [`checkpoint_live`](Self::checkpoint_live). Pages that could not
    /// be protected are marked for the next epoch too.
    pub fn checkpoint_incremental<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, Stage2CheckpointError<P::Error>> {
        Ok(self
            .tracker
            .checkpoint_incremental(epoch, &self.protection)?)
    }

    /// Extends the epoch of a save in progress as
    /// [`checkpoint_incremental`](Self::checkpoint_incremental) does, with a stopped guest.
    ///
    /// Once these pages are copied too, the image is of one point in time.
    ///
    /// # Errors
    /// Returns the same errors as [`checkpoint`](Self::checkpoint). Pages that could not be
    /// protected are marked for the next epoch too.
    pub fn checkpoint_final<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, Stage2CheckpointError<P::Error>> {
        let _stopped = self
            .vcpus
            .stop()
            .map_err(Stage2CheckpointError::vcpu_running)?;
        self.checkpoint_incremental(epoch)
    }

    /// Extends the epoch as [`checkpoint_final`](Self::checkpoint_final) does, and calls `frozen`
    /// with the pages before a vCPU can run.
    ///
    /// This is for a snapshot that copies pages before they are overwritten from now on.
    ///
    /// # Errors
    /// Returns the same errors as [`checkpoint_final`](Self::checkpoint_final). `frozen` was not
    /// called.
    pub fn checkpoint_final_with(
        &self,
        epoch: &mut TrackedEpoch,
        frozen: &mut dyn FnMut(&Extension<'_>),
    ) -> Result<(), Stage2CheckpointError<P::Error>> {
        let _stopped = self
            .vcpus
            .stop()
            .map_err(Stage2CheckpointError::vcpu_running)?;
        frozen(&self.checkpoint_incremental(epoch)?);
        Ok(())
    }

    /// Restores the marks of the open epoch. Returns whether there was one.
    ///
    /// This is for an epoch that was leaked or whose save is stuck: see
    /// [`WriteTracker::reclaim_epoch`].
    ///
    /// # Errors
    /// Returns [`EpochCommitting`] while the save commits.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.tracker.reclaim_epoch()
    }

    /// Ends the tracking: unprotects all of the RAM, and returns the write protection.
    ///
    /// Marks all of the RAM, also if it fails: later writes are not tracked.
    ///
    /// # Errors
    /// Returns the error of the platform. Some of the RAM may still be protected.
    #[expect(
        clippy::missing_panics_doc,
        reason = "the bitmap covers the RAM: checked when the tracker is made"
    )]
    pub fn stop(self) -> Result<P, P::Error> {
        let ram = 0..self.layout.ram_size();
        let lifted = self.protection.unprotect(ram.clone());
        let marked = self.bitmap().mark_range(ram.start, ram.end);
        assert!(
            marked.is_ok(),
            "the bitmap covers the RAM: checked when made"
        );
        lifted?;
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
