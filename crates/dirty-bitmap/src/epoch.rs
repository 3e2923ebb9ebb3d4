//! Marks checked out by a save; restored on drop unless released.

mod error;

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError};

use crate::bitmap::{DirtyBitmap, TakenBitmap};
use crate::coverage::{Coverage, TakeRange};
use crate::extension::Extension;
use crate::geometry::GeometryError;
use crate::kind::{Tracked, Untracked};
use crate::marks::Marks;
use crate::parent::ParentImage;
use crate::sync::{Mutex, MutexGuard};
pub use error::{
    BeginEpochError, EpochCommitting, EpochExtended, EpochReclaimed, ExtendError, NotReleased,
    ReleaseError,
};

/// The number of bitmaps that are kept for the next epoch: one for its marks, one for those of
/// [`extend`](Epoch::extend).
const MAX_RECYCLED: usize = 2;

/// The marks that one save has taken out of a bitmap.
///
/// An epoch that is dropped, after an error, a panic or an early return, restores its marks to the
/// bitmap, and the next save includes them. Only [`release_after`](Self::release_after) and
/// [`release`](Self::release) discard the marks, once the save is durable.
/// [`Coverage`](crate::Coverage) checks that all of the pages were written, and
/// `MemoryWriter::commit_and_release` of the crate `memory-writer` uses it.
///
/// A bitmap has one epoch at a time. With two, the later one could become durable while the earlier
/// one fails, and no diff of the chain would contain the earlier one's pages.
/// [`extend`](Self::extend) adds the pages that are dirtied during a save to its epoch.
///
/// An epoch that never ends, because it was leaked by [`std::mem::forget`] or its thread is stuck,
/// prevents later epochs until [`DirtyBitmap::reclaim_epoch`] restores its marks.
///
/// # Examples
/// A save whose guest keeps running (pre-copy):
/// ```
/// use dirty_bitmap::{DirtyBitmap, TakenBitmap};
/// # fn save_full() {}
/// # fn save_diff(pages: &TakenBitmap) {}
/// # fn commit() -> std::io::Result<()> { Ok(()) }
///
/// let bitmap = DirtyBitmap::new(0, 64 << 20, 4096)?;
/// let mut epoch = bitmap.begin_epoch()?; // a full save covers all marks so far
/// save_full(); // the guest runs, and marks pages
/// bitmap.mark(0x3000)?;
/// let dirtied = epoch.extend()?; // the guest is paused
/// save_diff(&dirtied);
/// epoch.release_after(commit)?; // on an error, all marks return
/// assert!(bitmap.is_clean());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Tracked bitmaps
/// The epoch of a [`TrackedBitmap`](crate::TrackedBitmap) is a [`TrackedEpoch`], which only
/// [`WriteTracker::checkpoint_incremental`](crate::WriteTracker::checkpoint_incremental) extends.
/// Taking marks without protecting their pages again would lose the next write to them:
/// ```compile_fail,E0599
/// # fn example(mut epoch: dirty_bitmap::TrackedEpoch) {
/// epoch.extend(); // of a TrackedEpoch
/// # }
/// ```
#[derive(Debug)]
#[must_use = "an epoch that is dropped restores its marks at once: keep it until its pages are durable"]
pub struct Epoch<B: Deref<Target = DirtyBitmap<K>>, K = Untracked> {
    /// The bitmap that the marks were taken out of.
    source: B,
    /// All marks of this epoch. The source holds a reference, to reclaim them.
    taken: Arc<TakenBitmap>,
    /// The marks that extended this epoch last.
    extension: Option<Arc<TakenBitmap>>,
    /// The image that the save writes.
    image: ParentImage,
    /// The takes whose pages were checked to be written, if any were.
    written: Option<TakeRange>,
    kind: PhantomData<fn() -> K>,
}

/// The epoch of a tracked bitmap: a checkpoint of a [`WriteTracker`](crate::WriteTracker).
pub type TrackedEpoch = Epoch<Arc<DirtyBitmap<Tracked>>, Tracked>;

impl<B: Deref<Target = DirtyBitmap>> Epoch<B> {
    /// Takes all marks out of `bitmap`.
    ///
    /// The epoch of an `Arc<DirtyBitmap>` can move to another thread. [`DirtyBitmap::begin_epoch`]
    /// borrows the bitmap instead.
    ///
    /// # Errors
    /// Returns [`BeginEpochError`] if another epoch holds marks of this bitmap, or if memory for
    /// the marks can't be allocated. No mark was taken.
    pub fn begin(bitmap: B) -> Result<Self, BeginEpochError> {
        Self::begin_any_kind(bitmap)
    }

    /// Takes the marks that were set since the last take, adds them to this epoch, and returns only
    /// them.
    ///
    /// # Errors
    /// Returns [`ExtendError`]. No mark was taken.
    pub fn extend(&mut self) -> Result<Extension<'_>, ExtendError> {
        self.extend_any_kind()
    }
}

impl<K, B: Deref<Target = DirtyBitmap<K>>> Epoch<B, K> {
    /// Returns all marks that this epoch has taken so far.
    pub fn bitmap(&self) -> &TakenBitmap {
        &self.taken
    }

    /// Returns the marks by which this epoch was extended last, or `None` if it was not extended.
    ///
    /// The pages of an [`Extension`] are in it, for a caller that cannot keep the borrow.
    pub fn last_extension(&self) -> Option<&TakenBitmap> {
        self.extension.as_deref()
    }

    /// Sets the image that the save writes. The default is [`ParentImage::Unknown`].
    ///
    /// A release makes it the [parent](DirtyBitmap::parent) of the next diff.
    /// `MemoryWriter::commit_and_release` and `PackedStream::finish_and_release` of the crate
    /// `memory-writer` call this.
    pub fn set_image(&mut self, image: ParentImage) {
        self.image = image;
    }

    /// Returns whether every page whose mark this epoch has taken was
    /// [written](Coverage::covers).
    ///
    /// After a check that succeeded, the epoch releases only the marks that were checked: if marks
    /// are added to it later, a release fails ([`EpochExtended`]) until they were written and
    /// checked too. `MemoryWriter::check_epoch` of the crate `memory-writer` calls this.
    ///
    /// # Examples
    /// ```
    /// use dirty_bitmap::{Coverage, DirtyBitmap};
    ///
    /// let bitmap = DirtyBitmap::new(0, 1 << 20, 4096)?;
    /// let mut epoch = bitmap.begin_epoch()?;
    /// let written = Coverage::new();
    /// assert!(epoch.check_written(&written)); // there was no mark
    /// bitmap.mark(0x5000)?;
    /// let _dirtied = epoch.extend()?; // not written
    /// epoch.release().unwrap_err();
    /// assert!(bitmap.is_dirty(0x5000)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use = "a check that fails has no effect on a release"]
    pub fn check_written(&mut self, written: &Coverage) -> bool {
        let takes = self.taken.takes();
        let is_written = takes.is_some_and(|takes| written.has(takes));
        if is_written {
            self.written = takes;
        }
        is_written
    }

    /// Runs `commit`, and discards the marks if it succeeds. If it fails, the marks return to the
    /// bitmap.
    ///
    /// After [`reclaim_epoch`](DirtyBitmap::reclaim_epoch), nothing is committed. While `commit`
    /// runs, `reclaim_epoch` is refused. Therefore a save never commits after a later save has
    /// taken over its pages, possibly to the same destination.
    ///
    /// `commit` must make the pages [durable](Self::release) before it returns. A caller that skips
    /// this accepts the loss of the pages in a crash.
    ///
    /// # Errors
    /// Returns [`ReleaseError::Reclaimed`] if the epoch was reclaimed before, and
    /// [`ReleaseError::Extended`] if marks were added to it after it was
    /// [checked](Self::check_written): `commit` was not called. Returns [`ReleaseError::Commit`]
    /// if `commit` failed.
    pub fn release_after<T, E>(
        mut self,
        commit: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, ReleaseError<E>> {
        self.check_not_extended()?;
        self.source.epochs.lock().begin_commit(&self.taken)?;
        // After an error or a panic, dropping the epoch restores its marks.
        let committed = commit().map_err(ReleaseError::Commit)?;
        self.end(false)?;
        Ok(committed)
    }

    /// Discards the marks, because the pages are durable.
    ///
    /// The caller ensures that every page of [`bitmap`](Self::bitmap) was written after its mark
    /// was taken. This includes the pages that [`extend`](Epoch::extend) took last. A full
    /// save must have begun after the epoch. This method does not check it: see
    /// [`check_written`](Self::check_written). A save that may be reclaimed must commit in
    /// [`release_after`](Self::release_after) instead.
    ///
    /// # Errors
    /// Returns [`NotReleased::Reclaimed`] if [`reclaim_epoch`](DirtyBitmap::reclaim_epoch) has
    /// restored the marks. They stay in the bitmap. Returns [`NotReleased::Extended`] if marks were
    /// added to the epoch after it was [checked](Self::check_written). All of its marks return to
    /// the bitmap.
    pub fn release(mut self) -> Result<(), NotReleased> {
        self.check_not_extended()?;
        Ok(self.end(false)?)
    }

    /// Checks that no marks were added since the check of the written pages, if there was one.
    fn check_not_extended(&self) -> Result<(), EpochExtended> {
        match self.written {
            Some(_) if self.written != self.taken.takes() => Err(EpochExtended),
            Some(_) | None => Ok(()),
        }
    }

    /// Begins an epoch of a bitmap of any kind.
    pub(crate) fn begin_any_kind(source: B) -> Result<Self, BeginEpochError> {
        let mut epochs = source.epochs.lock();
        if epochs.open.is_some() {
            return Err(BeginEpochError::AlreadyOpen);
        }
        let taken = epochs.take(&source.marks);
        let taken = taken.map_err(BeginEpochError::OutOfMemory)?;
        taken.set_takes(TakeRange::first(taken.is_clean()));
        taken.parent.set(source.parent());
        epochs.open = Some(Arc::clone(&taken));
        drop(epochs);
        Ok(Self {
            source,
            taken,
            extension: None,
            image: ParentImage::Unknown,
            written: None,
            kind: PhantomData,
        })
    }

    /// Extends an epoch of a bitmap of any kind.
    pub(crate) fn extend_any_kind(&mut self) -> Result<Extension<'_>, ExtendError> {
        // Held until the marks are in `taken`: a reclaim in between would miss them.
        let mut epochs = self.source.epochs.lock();
        if !epochs.is_open(&self.taken) {
            return Err(EpochReclaimed.into());
        }
        if let Some(previous) = self.extension.take() {
            epochs.recycle(previous);
        }
        let extension = epochs.take(&self.source.marks)?;
        if let Some(previous) = self.taken.takes() {
            let takes = previous.next(extension.is_clean());
            extension.set_takes(takes);
            self.taken.set_takes(takes.since_first());
        }
        extension.parent.set(self.taken.parent());
        self.taken.marks.add(&extension.marks);
        drop(epochs);
        Ok(Extension::new(self.extension.insert(extension)))
    }

    /// Returns the bitmap that the marks were taken out of.
    pub(crate) fn source(&self) -> &B {
        &self.source
    }

    /// Ends the epoch, and restores its marks if `restore`.
    fn end(&mut self, restore: bool) -> Result<(), EpochReclaimed> {
        let mut epochs = self.source.epochs.lock();
        if !epochs.is_open(&self.taken) {
            return Err(EpochReclaimed);
        }
        // Restore the marks before another epoch can begin, which would miss them.
        match restore {
            true => self.source.marks.add(&self.taken.marks),
            false => self.source.parent.set(self.image),
        }
        epochs.open = None;
        epochs.committing = false;
        epochs.recycle(Arc::clone(&self.taken));
        if let Some(extension) = self.extension.take() {
            epochs.recycle(extension);
        }
        Ok(())
    }
}

impl<K, B: Deref<Target = DirtyBitmap<K>>> Drop for Epoch<B, K> {
    fn drop(&mut self) {
        // A released or reclaimed epoch has nothing to restore.
        let _ = self.end(true);
    }
}

/// The open epoch of a bitmap, and the bitmaps kept for the next one.
pub(crate) struct Epochs {
    state: Mutex<EpochState>,
    /// Whether a tracker uses the bitmap. No mark depends on the ordering of this flag.
    pub(crate) tracked: AtomicBool,
}

pub(crate) struct EpochState {
    /// The marks of the open epoch: one that is not released, dropped or reclaimed.
    open: Option<Arc<TakenBitmap>>,
    /// Whether the save of that epoch is committing.
    committing: bool,
    /// Clean bitmaps of earlier epochs.
    recycled: Vec<Arc<TakenBitmap>>,
}

impl Epochs {
    pub(crate) fn reclaim(&self, source: &Marks) -> Result<bool, EpochCommitting> {
        let mut epochs = self.lock();
        if epochs.committing {
            return Err(EpochCommitting);
        }
        // The epoch keeps a copy of its marks, because its owner may still read them.
        let taken = epochs.open.take();
        if let Some(taken) = &taken {
            source.add(&taken.marks);
        }
        Ok(taken.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, EpochState> {
        // After a panic with the lock held, each mark is in the source or in the epoch.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            state: Mutex::new(EpochState {
                open: None,
                committing: false,
                recycled: Vec::new(),
            }),
            tracked: AtomicBool::new(false),
        }
    }
}

impl EpochState {
    fn is_open(&self, taken: &Arc<TakenBitmap>) -> bool {
        self.open
            .as_ref()
            .is_some_and(|open| Arc::ptr_eq(open, taken))
    }

    /// Protects the epoch from being reclaimed until it ends.
    fn begin_commit(&mut self, taken: &Arc<TakenBitmap>) -> Result<(), EpochReclaimed> {
        if !self.is_open(taken) {
            return Err(EpochReclaimed);
        }
        self.committing = true;
        Ok(())
    }

    /// Takes all marks, into a recycled bitmap if there is one of the current granule.
    fn take(&mut self, source: &Marks) -> Result<Arc<TakenBitmap>, GeometryError> {
        let recycled = &mut self.recycled;
        let clean = |shift: u32| {
            let found = recycled.iter_mut().position(|bitmap| {
                // An epoch that has ended may still refer to it, and would take this epoch for
                // itself.
                Arc::get_mut(bitmap).is_some() && bitmap.marks.page_shift == shift
            });
            match found {
                Some(found) => Ok(recycled.swap_remove(found)),
                None => {
                    Marks::clean(source.ram, shift).map(|marks| Arc::new(TakenBitmap::over(marks)))
                }
            }
        };
        source.take(clean, |taken| &taken.marks)
    }

    /// Clears a bitmap and keeps it for a later epoch.
    fn recycle(&mut self, taken: Arc<TakenBitmap>) {
        taken.marks.clear();
        // Drop the oldest: the newest ones have the current granule.
        if self.recycled.len() == MAX_RECYCLED {
            self.recycled.remove(0);
        }
        self.recycled.push(taken);
    }
}
