//! The tracker of a guest's writes by userfaultfd.

mod options;

use std::io::{self, PipeWriter};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use dirty_bitmap::{Extension, ParentImage, TrackedBitmap, TrackedEpoch};
use page_reader::PageReader;

use super::handler::Shared;
use super::pagemap::Pagemap;
use super::tracker_error::{UffdCheckpointError, UffdTrackerError};
use crate::slot::CaptureSlot;
use crate::tracker::{CheckpointFailed, LiveTracker};
use options::{host_page_size, open_userfaultfd};

pub use options::UffdTrackerOptions;

/// A tracker of all writes to a guest's RAM in this process, by userfaultfd.
///
/// The first write to a page after a checkpoint waits for a thread of this tracker: a write by a
/// vCPU, by the VMM, or by the kernel for it. The thread copies the page if a snapshot in progress
/// needs it, unprotects it, and marks it. Neither KVM's dirty log nor marks of devices are needed,
/// except for the writes [below](#what-it-does-not-see).
///
/// # What it does not see
/// - **Writes of other processes** to shared memory, such as a vhost-user back end. Stop them
///   before [`freeze`](crate::LiveSnapshot::freeze) until the snapshot is written, and
///   [mark](Self::mark_range) what they wrote.
/// - **Data that arrives in pinned memory** (`O_DIRECT` reads, `process_vm_writev`, `io_uring` with
///   registered buffers, VFIO, vDPA). A page faults when it is pinned, not when the data arrives,
///   and registered memory is pinned once. Complete such requests before `freeze`, and
///   [mark](Self::mark_range) what each has written when it is complete. The mark is needed if the
///   memory was pinned before the last snapshot, or if the request was in flight while pre-copy
///   wrote.
/// - **Writes by another mapping or by the file** of shared memory, in this process too (`pwrite`
///   to a memfd). Mark them.
/// - **Discards** (balloon, free page reporting, `MADV_DONTNEED`, `MADV_REMOVE`, hole punching):
///   make them in [`discard`](Self::discard), at any time. Anonymous memory loses its protection by
///   other discards: a snapshot in progress ends with
///   [`LiveError::Discarded`](crate::LiveError::Discarded), and the next one marks the pages.
///   Memory of files keeps its protection, memfds and private mappings included, so other discards
///   of it are not noticed.
///
/// # Child processes
/// After `fork`, a child has private memory of its own, whose writes are not tracked. Shared memory
/// stays shared, so the child counts as another process.
///
/// # Cost
/// The RAM is registered with a userfaultfd until this is dropped, which makes it writable again.
/// Equal pages that the kernel has merged (KSM) are separated, and merging ends. Full
/// images by copy-on-write do not store zeros. Those of anonymous RAM read all pages, because the
/// kernel reports untouched pages as swapped out once they are protected; untouched pages of a
/// memfd are not read. For the other methods, set `MemoryWriterOptions::skip_zeros`.
/// Transparent huge pages are split when they are written. Page tables of all of the RAM are
/// allocated at the first checkpoint: 8 bytes for each page.
///
/// # Examples
/// ```
/// # if !test_machine::Need::Userfaultfd.met("the example of UffdTracker") { return Ok(()); }
/// use std::sync::Arc;
/// use guest_ram::GuestRam;
/// use live_snapshot::{LiveSnapshot, UffdTracker};
/// use memory_writer::MemoryWriter;
/// use page_reader::RamLayout;
///
/// # let dir = tempfile::tempdir()?;
/// # let dest = dir.path().join("full.mem");
/// let ram: Arc<GuestRam> = Arc::new(GuestRam::new(RamLayout::single(0, 16 << 20)?)?);
/// let tracker = Arc::new(UffdTracker::start(&ram)?);
/// // ... the guest runs ...
/// let writer = MemoryWriter::open(&dest, 16 << 20, 4096)?;
/// let live = LiveSnapshot::options().begin(&tracker, writer)?;
/// // ... pause the vCPUs ...
/// let frozen = live.freeze()?;
/// // ... resume them ...
/// let report = frozen.commit()?;
/// println!("the pause took {:?}", report.freeze);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the RAM is not tracked any more when this is dropped"]
pub struct UffdTracker {
    shared: Arc<Shared>,
    pagemap: Pagemap,
    /// Held for reading by discards, and for writing at the point in time of a snapshot.
    discards: RwLock<()>,
    /// Closing this end stops the thread.
    hang_up: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    /// Dropped last: the memory stays mapped while it is registered.
    memory: Memory,
}

/// RAM that stays mapped.
struct Memory(Arc<dyn PageReader + Send + Sync>);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

impl UffdTracker {
    /// Returns options for the page size and the policy.
    pub fn options() -> UffdTrackerOptions {
        UffdTrackerOptions::default()
    }

    /// Checks that this process may track writes: that the kernel has userfaultfd with write
    /// protection of unpopulated memory (Linux 6.4), and that this process may open one that
    /// handles faults of the kernel.
    ///
    /// # Errors
    /// Returns [`UffdTrackerError::Open`], which names what permits it, or
    /// [`UffdTrackerError::Pagemap`]. A process that may not can get a
    /// [descriptor](UffdTrackerOptions::userfaultfd) from another one.
    pub fn available() -> Result<(), UffdTrackerError> {
        drop(open_userfaultfd(None)?);
        let pagemap = host_page_size().and_then(Pagemap::open);
        pagemap.map(drop).map_err(UffdTrackerError::Pagemap)
    }

    /// Starts to track the writes to all of the RAM. No page is protected yet, and all are marked:
    /// the first snapshot has all pages.
    ///
    /// Needs root, `CAP_SYS_PTRACE`, access to `/dev/userfaultfd`, the sysctl
    /// `vm.unprivileged_userfaultfd`, or a descriptor from a process that has one of them:
    /// [`UffdTrackerOptions::userfaultfd`].
    ///
    /// # Errors
    /// Returns [`UffdTrackerError`].
    pub fn start<M>(memory: &Arc<M>) -> Result<Self, UffdTrackerError>
    where
        M: PageReader + Send + Sync + 'static,
    {
        Self::options().start(memory)
    }

    /// Marks bytes of the memory file that were written or discarded unseen, after that.
    ///
    /// A snapshot in progress copies the pages first, if it needs them, and may wait for the file
    /// that is being written.
    ///
    /// # Errors
    /// Returns the errors of [`mark_range`](dirty_bitmap::DirtyBitmap::mark_range).
    pub fn mark_range(&self, offset: u64, len: u64) -> Result<(), dirty_bitmap::OutOfRange> {
        self.look_before_mark(offset, len)?;
        self.bitmap().mark_range(offset, len).map(drop)
    }

    /// Copies the pages that a snapshot in progress needs, and ends it if pages were discarded
    /// unseen: a mark hides that their protection is missing.
    fn look_before_mark(&self, offset: u64, len: u64) -> Result<(), dirty_bitmap::OutOfRange> {
        // Returns the error for a range that is not RAM.
        self.bitmap().is_dirty(offset)?;
        let ram_size = self.bitmap().ram_size();
        let end = offset.saturating_add(len).min(ram_size);
        // Whole pages: the mark is of whole pages too.
        let page_size = self.bitmap().page_size();
        let range = offset - offset % page_size..end.next_multiple_of(page_size).min(ram_size);
        if let Some(capture) = self.shared.protection.slot().copy_pages(range.clone()) {
            let _no_faults = self.shared.no_faults();
            capture.check_discarded(range);
        }
        Ok(())
    }

    /// Discards bytes of the memory file: calls `discard`, and marks them. A snapshot in progress
    /// copies them first, and may wait for the file that is being written. While stop-and-copy
    /// writes the RAM, this waits for the end of the pause.
    ///
    /// `discard` returns the pages to the host, by `madvise` or `fallocate`. It must not write the
    /// RAM. Do not call this from the progress callback of a writer: it would wait for itself.
    ///
    /// # Errors
    /// Returns the errors of [`mark_range`](dirty_bitmap::DirtyBitmap::mark_range): `discard` was
    /// not called.
    pub fn discard<T>(
        &self,
        offset: u64,
        len: u64,
        discard: impl FnOnce() -> T,
    ) -> Result<T, dirty_bitmap::OutOfRange> {
        // A snapshot's point in time is before the copy or after the discard.
        let _discards = loop {
            let discards = self.discards.read();
            let discards = discards.unwrap_or_else(PoisonError::into_inner);
            let slot = self.shared.protection.slot();
            if !slot.is_held() {
                break discards;
            }
            drop(discards);
            slot.wait_while_held();
        };
        self.look_before_mark(offset, len)?;
        // Marked before too: a page that lost its protection without a mark ends a snapshot.
        self.bitmap().mark_range(offset, len)?;
        let discarded = discard();
        self.bitmap().mark_range(offset, len)?;
        Ok(discarded)
    }

    /// Makes the present contents of the RAM the baseline of the next diff: they are those of this
    /// image, from which the RAM was restored. The guest does not run yet.
    ///
    /// # Errors
    /// Returns [`UffdCheckpointError`]. All marks are in the bitmap.
    pub fn set_baseline(&self, image: ParentImage) -> Result<(), UffdCheckpointError> {
        let mut epoch = self.checkpoint()?;
        epoch.set_image(image);
        Ok(epoch.release()?)
    }

    /// Takes all marks into an epoch, and protects their pages.
    fn checkpoint(&self) -> Result<TrackedEpoch, UffdCheckpointError> {
        self.check_handled()?;
        let epoch = self.shared.tracker.checkpoint(&self.shared.protection)?;
        self.check_handled()?;
        Ok(epoch)
    }

    fn checkpoint_incremental<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, UffdCheckpointError> {
        self.check_handled()?;
        let protection = &self.shared.protection;
        let extension = self
            .shared
            .tracker
            .checkpoint_incremental(epoch, protection)?;
        self.check_handled()?;
        Ok(extension)
    }

    fn check_handled(&self) -> Result<(), UffdCheckpointError> {
        let failed = self
            .shared
            .failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match &*failed {
            Some(error) => Err(UffdCheckpointError::Untracked(Arc::clone(error))),
            None => Ok(()),
        }
    }
}

impl LiveTracker for UffdTracker {
    fn memory(&self) -> Arc<dyn PageReader + Send + Sync> {
        Arc::clone(&self.memory.0)
    }

    fn bitmap(&self) -> &Arc<TrackedBitmap> {
        self.shared.tracker.bitmap()
    }

    fn begin_epoch(&self) -> Result<TrackedEpoch, CheckpointFailed> {
        Ok(self.checkpoint()?)
    }

    fn extend_epoch<'e>(
        &self,
        epoch: &'e mut TrackedEpoch,
    ) -> Result<Extension<'e>, CheckpointFailed> {
        Ok(self.checkpoint_incremental(epoch)?)
    }

    fn freeze_epoch(
        &self,
        epoch: &mut TrackedEpoch,
        frozen: &mut dyn FnMut(&Extension<'_>),
    ) -> Result<(), CheckpointFailed> {
        let no_discards = self.discards.write();
        let _no_discards = no_discards.unwrap_or_else(PoisonError::into_inner);
        let _no_faults = self.shared.no_faults();
        frozen(&self.checkpoint_incremental(epoch)?);
        Ok(())
    }

    fn slot(&self) -> Option<&CaptureSlot> {
        Some(self.shared.protection.slot())
    }

    fn is_protected(&self, range: Range<u64>) -> io::Result<bool> {
        let mut addresses = self.shared.protection.protection().addresses(range);
        addresses.try_fold(true, |all, one| {
            Ok(all && self.pagemap.first_unprotected(one)?.is_none())
        })
    }

    fn find_discarded(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        let bitmap = self.bitmap();
        let protection = self.shared.protection.protection();
        for mut addresses in protection.addresses(range) {
            while let Some(run) = self.pagemap.first_unprotected(addresses.clone())? {
                let offset = protection.offset_of(run.start).unwrap_or(0);
                let end = offset + (run.end - run.start);
                // The run may begin and end inside of pages.
                let page_size = bitmap.page_size();
                let first = offset - offset % page_size;
                let mut pages = (first..end).step_by(usize::try_from(page_size).unwrap_or(1));
                let is_clean = |page: &u64| bitmap.is_dirty(*page) == Ok(false);
                if let Some(page) = pages.find(is_clean) {
                    return Ok(Some(page));
                }
                addresses.start = run.end;
            }
        }
        Ok(None)
    }

    fn mark_discarded(&self) -> Result<Option<u64>, CheckpointFailed> {
        self.check_handled()?;
        let bitmap = self.bitmap();
        let (ram_size, page_size) = (bitmap.ram_size(), bitmap.page_size());
        let (mut at, mut first) = (0, None);
        while bitmap.dirty_pages() < ram_size / page_size
            && let Some(found) = self.find_discarded(at..ram_size)?
        {
            // A page that a fault has unprotected is marked next.
            let no_faults = self.shared.no_faults();
            if let Some(page) = self.find_discarded(found..found + page_size)? {
                bitmap.mark_range(page, page_size)?;
                first.get_or_insert(page);
            }
            drop(no_faults);
            at = found + page_size;
        }
        self.check_handled()?;
        Ok(first)
    }
}

impl Drop for UffdTracker {
    fn drop(&mut self) {
        // First, which lets waiting writes continue: a fault without a handler waits forever.
        let _ = self.shared.protection.protection().unregister();
        drop(self.hang_up.take());
        let this = thread::current().id();
        // The thread itself may have had the last reference, while it looked for discarded pages.
        if let Some(thread) = self.thread.take().filter(|it| it.thread().id() != this) {
            // The thread does not unwind, and an error of it was recorded.
            let _ = thread.join();
        }
    }
}
