//! Dirty tracking by write faults: handling faults, and protecting pages again at checkpoints.

mod error;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

pub use error::{CheckpointError, FaultError, TrackerError};

use crate::bitmap::TrackedBitmap;
use crate::blocks::{BLOCK_SIZE, Blocks, Unprotect};
use crate::epoch::{Epoch, EpochCommitting, TrackedEpoch};
use crate::extension::Extension;
use crate::policy::Policy;
use crate::protection::WriteProtection;
use crate::ranges::{coalesce_within, widen};
use crate::runs::Runs;

/// The most clean pages between two runs that are protected in one call. They are protected
/// already, so this only saves time: walking them takes as long as a second call.
const MAX_BRIDGED_PAGES: u64 = 16;

/// A dirty tracker that write-protects guest memory, and adapts how much of it each write fault
/// unprotects.
///
/// Where writes are found by faults (Apple's Hypervisor framework, userfaultfd, `mprotect`), the
/// cost depends on the granularity. If a fault unprotects one page, the guest waits at every page
/// that it writes. If a fault unprotects a large block, diffs contain clean pages. The tracker
/// therefore chooses for each block of [2 MiB](crate::BLOCK_SIZE), as its [`Policy`] says, and may
/// change the choice at any checkpoint.
///
/// The choice never moves marks. The bitmap always has a bit for each page, and a fault marks
/// *exactly the pages it unprotected*, one page or 512. A choice that is outdated by a concurrent
/// checkpoint costs time, but it never loses a page.
///
/// # Order
/// A fault is handled by unprotecting the pages, *then* marking them, *then* resuming the vCPU
/// ([`on_write_fault`](Self::on_write_fault), and its caller). A checkpoint takes the marks, *then*
/// protects their pages ([`checkpoint`](Self::checkpoint)), *then* the caller copies the pages.
/// Either the checkpoint takes the mark, and its protection makes the next write fault again; or
/// the mark stays for the next checkpoint. Marking first loses a page: see
/// [`DirtyBitmap`](crate::DirtyBitmap#mark-last).
///
/// If a step of a save is skipped:
/// - **Take**: no page is lost. The marks stay in the bitmap, and the save has no pages.
/// - **Protect**: later writes to the pages do not fault and set no marks, so the next save lacks
///   them. Protecting before the take has the same result for a page that is written in between:
///   its fault unprotects it, and then its mark is taken.
/// - **Copy**: the release discards the marks of pages that are in no image.
/// - **Release**: no page is lost. A dropped epoch restores its marks. A leaked one blocks the next
///   checkpoint until it is [reclaimed](Self::reclaim_epoch). A release before the image is durable
///   loses the pages in a crash.
///
/// [`checkpoint`](Self::checkpoint) takes and protects. The caller copies and releases.
///
/// # Discarded pages
/// A discard (a balloon, free page reporting, `MADV_DONTNEED`, `MADV_REMOVE`, hole punching) turns
/// a page into zeros without a write fault. With userfaultfd it also removes the protection, so
/// that later writes do not fault either. Mark each page *after* it was discarded, for example by
/// [`mark_range`](crate::DirtyBitmap::mark_range): the next checkpoint then saves it and protects
/// it again. An unmarked one is missing from the diffs, and a restore has its old bytes.
///
/// # Types
/// The types enforce the order. The bitmap is a [`TrackedBitmap`], which other code can mark and
/// read. Only the tracker takes its marks, and it has one tracker at a time.
/// ```compile_fail,E0599
/// # fn example(tracker: &dirty_bitmap::WriteTracker) {
/// tracker.bitmap().drain();
/// # }
/// ```
/// ```compile_fail,E0599
/// # fn example(tracker: &dirty_bitmap::WriteTracker) {
/// tracker.bitmap().begin_epoch();
/// # }
/// ```
///
/// All methods may be called by many threads at once, also while the bitmap is
/// [rebuilt](crate::DirtyBitmap::rebuild).
///
/// # Memory
/// A tracker needs 16 bytes for each 2 MiB of RAM, in addition to the bitmap.
///
/// # Examples
/// ```
/// use std::{convert::Infallible, ops::Range, sync::Arc};
///
/// use dirty_bitmap::{Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};
///
/// struct Stage2; // calls the hypervisor
/// impl WriteProtection for Stage2 {
///     type Error = Infallible;
///     fn protect(&self, range: Range<u64>) -> Result<(), Infallible> { Ok(()) }
///     fn unprotect(&self, range: Range<u64>) -> Result<(), Infallible> { Ok(()) }
/// }
/// # fn write_full() -> std::io::Result<()> { Ok(()) }
/// # fn write_diff(_: &TakenBitmap) -> std::io::Result<()> { Ok(()) }
///
/// let bitmap = Arc::new(TrackedBitmap::tracked(0x8000_0000, 64 << 20, 16 << 10)?);
/// let tracker = WriteTracker::new(bitmap, Policy::default())?;
///
/// // The first checkpoint has all pages, because no page was protected before.
/// let epoch = tracker.checkpoint(&Stage2)?;
/// write_full()?;
/// epoch.release()?;
///
/// // A vCPU's write faults. On return the page is unprotected and marked, and the vCPU may resume.
/// tracker.on_write_fault(0x8012_3456, &Stage2)?;
/// // Host writes never fault. The host writes, then marks.
/// tracker.bitmap().mark_range(0x8000_0000, 512)?;
///
/// let epoch = tracker.checkpoint(&Stage2)?;
/// write_diff(epoch.bitmap())?; // on an error, the marks return
/// epoch.release()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a tracker that is dropped leaves its pages protected, and handles no fault"]
pub struct WriteTracker {
    bitmap: Arc<TrackedBitmap>,
    blocks: Blocks,
    _claim: Claim,
}

/// The exclusive use of a bitmap by a tracker, which ends on drop.
struct Claim(Option<Arc<TrackedBitmap>>);

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(bitmap) = &self.0 {
            bitmap.epochs.tracked.store(false, SeqCst);
        }
    }
}

impl WriteTracker {
    /// Creates a tracker of the RAM that `bitmap` covers, in pages of its page size.
    ///
    /// The platform must be able to protect pages of this size. All of the RAM is marked, because
    /// no page is protected yet.
    ///
    /// # Errors
    /// Returns [`TrackerError`] if the RAM does not consist of whole pages, if pages are larger
    /// than a [block](BLOCK_SIZE), or if the bitmap has another tracker. No page was marked.
    pub fn new(bitmap: Arc<TrackedBitmap>, policy: Policy) -> Result<Self, TrackerError> {
        let (ram_start, ram_size) = (bitmap.ram_start(), bitmap.ram_size());
        let page_size = bitmap.page_size();
        if page_size > BLOCK_SIZE {
            return Err(TrackerError::PageLargerThanBlock { page_size });
        }
        if !ram_start.is_multiple_of(page_size) || !ram_size.is_multiple_of(page_size) {
            return Err(TrackerError::NotAligned {
                ram_start,
                ram_size,
                page_size,
            });
        }
        let blocks = Blocks::new(ram_size.div_ceil(BLOCK_SIZE), page_size, policy)
            .map_err(TrackerError::OutOfMemory)?;
        if bitmap.epochs.tracked.swap(true, SeqCst) {
            return Err(TrackerError::AlreadyTracked);
        }
        bitmap.marks.mark_offsets(0..ram_size);
        Ok(Self {
            _claim: Claim(Some(Arc::clone(&bitmap))),
            bitmap,
            blocks,
        })
    }

    /// Creates a second tracker of the same RAM with another policy, for models of races between
    /// policies.
    #[cfg(ramsnap_loom)]
    #[doc(hidden)]
    #[must_use]
    pub fn with_policy(&self, policy: Policy) -> Self {
        let bitmap = Arc::clone(&self.bitmap);
        let blocks = bitmap.ram_size().div_ceil(BLOCK_SIZE);
        Self {
            blocks: Blocks::new(blocks, bitmap.page_size(), policy).expect("memory"),
            bitmap,
            _claim: Claim(None),
        }
    }

    /// Returns the bitmap. The host must mark its own writes in it.
    #[must_use]
    pub fn bitmap(&self) -> &Arc<TrackedBitmap> {
        &self.bitmap
    }

    /// Returns the number of blocks that are currently planned to be unprotected as a whole.
    #[must_use]
    pub fn whole_blocks(&self) -> u64 {
        self.blocks.whole_blocks()
    }

    /// Handles a write fault at `address`. Returns the unprotected range around the address.
    ///
    /// This unprotects the page, or more of its block, and then marks the unprotected pages. The
    /// write may resume after this returns.
    ///
    /// If the platform refuses to unprotect a single page, this unprotects the block, and otherwise
    /// all of the RAM. Linux refuses it when the process has too many mappings.
    ///
    /// # Errors
    /// Returns [`FaultError`] if the address is outside the RAM, or if unprotecting failed. The
    /// write must not resume. Every page that may be unprotected is marked.
    pub fn on_write_fault<P: WriteProtection>(
        &self,
        address: u64,
        protection: &P,
    ) -> Result<Range<u64>, FaultError<P::Error>> {
        let offset = self
            .bitmap
            .marks
            .offset_of(address)
            .map_err(FaultError::OutOfRange)?;
        let (start, size) = (self.bitmap.ram_start(), self.bitmap.ram_size());
        let page_size = self.bitmap.page_size();
        // Computed in offsets, because the address of the end of a block may exceed 64 bits.
        let around = |unit: u64| {
            let from = offset - offset % unit;
            from..size.min(from + unit)
        };
        let (page, block) = (around(page_size), around(BLOCK_SIZE));
        let unprotect = |offsets: Range<u64>| {
            let range = start + offsets.start..start + offsets.end;
            let unprotected = protection.unprotect(range.clone());
            // Mark even after an error, because some of the pages may be unprotected.
            self.bitmap.marks.mark_offsets(offsets);
            match unprotected {
                Ok(()) => Ok(range),
                Err(source) => Err(FaultError::Unprotect { range, source }),
            }
        };
        let in_block = (page.start - block.start) / page_size;
        let part = self
            .blocks
            .on_fault((offset / BLOCK_SIZE) as usize, in_block as u32);
        let unprotected = match part {
            Unprotect::Page => unprotect(page),
            Unprotect::Block => unprotect(block.clone()),
            Unprotect::BlockExcept(sample) => {
                let at = |page: u32| block.end.min(block.start + u64::from(page) * page_size);
                let (before, after) = (block.start..at(sample.start), at(sample.end)..block.end);
                let (faulting, other) = match before.contains(&page.start) {
                    true => (before, after),
                    false => (after, before),
                };
                // The other side is only unprotected in advance: after an error here, its pages
                // fault on their own.
                if !other.is_empty() {
                    let _ = unprotect(other);
                }
                unprotect(faulting)
            }
        };
        unprotected.or_else(|first_error| {
            let wider = unprotect(block).or_else(|_| unprotect(0..size));
            wider.map_err(|_| first_error)
        })
    }

    /// Makes a checkpoint: takes all marks into an epoch, protects their pages, and updates the
    /// plan of each block.
    ///
    /// After this returns, every page of the epoch may be copied. A write to it faults, and marks
    /// it for the next epoch.
    ///
    /// vCPUs may run. For a point-in-time image, they must be stopped until the pages are copied.
    ///
    /// # Errors
    /// Returns [`CheckpointError`] if a save is in progress or the protection failed. All marks are
    /// in the bitmap.
    pub fn checkpoint<P: WriteProtection>(
        &self,
        protection: &P,
    ) -> Result<TrackedEpoch, CheckpointError<P::Error>> {
        let epoch =
            Epoch::begin_any_kind(Arc::clone(&self.bitmap)).map_err(CheckpointError::Epoch)?;
        self.protect_taken(epoch.bitmap().runs(), protection)?;
        Ok(epoch)
    }

    /// Extends the epoch of a save in progress by the marks set since, and protects their pages.
    /// Returns only the new marks.
    ///
    /// This is for pre-copy: the guest runs while most pages are saved, and is paused for the rest.
    ///
    /// # Errors
    /// Returns [`CheckpointError`]. Every page that is not protected is marked for the next epoch
    /// too. The epoch of another bitmap is refused, because this tracker can't protect its pages.
    pub fn checkpoint_incremental<'e, P: WriteProtection>(
        &self,
        epoch: &'e mut TrackedEpoch,
        protection: &P,
    ) -> Result<Extension<'e>, CheckpointError<P::Error>> {
        if !Arc::ptr_eq(epoch.source(), &self.bitmap) {
            return Err(CheckpointError::OtherBitmap);
        }
        let extension = epoch.extend_any_kind().map_err(CheckpointError::Extend)?;
        if let Err(error) = self.protect_taken(extension.runs(), protection) {
            self.bitmap.marks.add(&extension.marks);
            return Err(error);
        }
        Ok(extension)
    }

    /// Restores the marks of the open epoch. Returns whether there was one.
    ///
    /// See [`DirtyBitmap::reclaim_epoch`](crate::DirtyBitmap::reclaim_epoch).
    ///
    /// # Errors
    /// Returns [`EpochCommitting`] while the save commits.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.bitmap.epochs.reclaim(&self.bitmap.marks)
    }

    /// Protects the pages of the `taken` runs, and updates the plan of each block in them.
    fn protect_taken<P: WriteProtection>(
        &self,
        taken: Runs<'_>,
        protection: &P,
    ) -> Result<(), CheckpointError<P::Error>> {
        let start = self.bitmap.ram_start();
        let page_size = self.bitmap.page_size();
        // The current block and its number of dirty pages.
        let mut dirty = (0, 0);
        let mut count_dirty = |run: &Range<u64>| {
            let mut at = run.start;
            while at < run.end {
                let block = at / BLOCK_SIZE;
                let end = run.end.min((block + 1) * BLOCK_SIZE);
                if block != dirty.0 {
                    self.blocks.on_checkpoint(dirty.0 as usize, dirty.1);
                    dirty = (block, 0);
                }
                dirty.1 += u32::try_from((end - at) / page_size).unwrap_or(u32::MAX);
                at = end;
            }
        };
        // The granule of the bitmap may be finer than the pages that can be protected.
        let runs = taken
            .map(|run| widen(&run, page_size))
            .inspect(&mut count_dirty);
        let bridged = match protection.may_bridge() {
            true => MAX_BRIDGED_PAGES * page_size,
            false => 0,
        };
        for range in coalesce_within(runs, bridged) {
            let range = start + range.start..start + range.end;
            let Err(source) = protection.protect(range.clone()) else {
                continue;
            };
            if !protection.may_bridge() {
                return Err(CheckpointError::Protect { range, source });
            }
            // The platform may refuse a further small range. Protecting all of the RAM needs a
            // single range.
            let all = start..start + self.bitmap.ram_size();
            let retried = protection.protect(all);
            retried.map_err(|_| CheckpointError::Protect { range, source })?;
        }
        self.blocks.on_checkpoint(dirty.0 as usize, dirty.1);
        Ok(())
    }
}

impl fmt::Debug for WriteTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteTracker")
            .field("bitmap", &self.bitmap)
            .field("whole_blocks", &self.whole_blocks())
            .finish_non_exhaustive()
    }
}
