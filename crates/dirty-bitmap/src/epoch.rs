//! Marks checked out by a save; restored on drop unless released.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError};

use thiserror::Error;

use crate::bitmap::{DirtyBitmap, TakenBitmap};
use crate::coverage::Part;
use crate::geometry::GeometryError;
use crate::kind::{Tracked, Untracked};
use crate::marks::Marks;
use crate::sync::{Mutex, MutexGuard};

/// As many bitmaps are kept for the next epoch: one for its marks, one for those of
/// [`take_more`](Epoch::take_more).
const SPARES: usize = 2;

/// The marks that one save has taken out of a bitmap.
///
/// Dropped for whatever reason (an error, a panic, an early return), the epoch merges its marks back, and the next save
/// has them again. Only [`release_after`](Self::release_after) and [`release`](Self::release) forget them, once the save is
/// durable. Whether all of the pages were written, [`Coverage`](crate::Coverage) knows, and `MemoryWriter::commit_and_release` of
/// the crate `memory-writer` checks.
///
/// A bitmap has one epoch at a time. With two, the later one could become durable while the earlier one fails, and
/// the earlier one's pages would be in no diff of the chain. What is dirtied while a save runs joins its
/// epoch by [`take_more`](Self::take_more).
///
/// An epoch that never ends (leaked by [`std::mem::forget`], or of a thread that is stuck) keeps later ones from beginning until
/// [`DirtyBitmap::reclaim_epoch`] takes its marks back.
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
/// let mut epoch = bitmap.begin_epoch()?; // a full save covers whatever was marked so far
/// save_full(); // the guest goes on, and marks
/// bitmap.set_dirty(0x3000)?;
/// let meanwhile = epoch.take_more()?; // the guest is paused now
/// save_diff(meanwhile);
/// epoch.release_after(commit)?; // had this failed, all marks would be back
/// assert!(bitmap.is_clean());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Tracked bitmaps
/// The epoch of a [`TrackedBitmap`](crate::TrackedBitmap) is a [`TrackedEpoch`], extended by
/// [`WriteTracker::arm_more`](crate::WriteTracker::arm_more) alone. Taken without protecting their pages again, marks would be
/// lost with the next write:
/// ```compile_fail,E0599
/// # fn example(mut epoch: dirty_bitmap::TrackedEpoch) {
/// epoch.take_more(); // of a TrackedEpoch
/// # }
/// ```
#[derive(Debug)]
#[must_use = "an epoch that is dropped gives its marks back at once"]
pub struct Epoch<B: Deref<Target = DirtyBitmap<K>>, K = Untracked> {
    live: B,
    /// The bitmap has it too, to reclaim its marks.
    taken: Arc<TakenBitmap>,
    /// What was taken last.
    more: Option<Arc<TakenBitmap>>,
    kind: PhantomData<fn() -> K>,
}

/// The epoch of a tracked bitmap: a checkpoint of a [`WriteTracker`](crate::WriteTracker).
pub type TrackedEpoch = Epoch<Arc<DirtyBitmap<Tracked>>, Tracked>;

impl<B: Deref<Target = DirtyBitmap>> Epoch<B> {
    /// Takes all marks out of `live`. With an `Arc<DirtyBitmap>` the epoch can move to another thread;
    /// [`DirtyBitmap::begin_epoch`] borrows instead.
    ///
    /// # Errors
    /// [`BeginEpochError`] while another epoch holds marks of this bitmap, or where there is no memory for the marks: nothing was taken.
    pub fn begin(live: B) -> Result<Self, BeginEpochError> {
        Self::begin_any(live)
    }

    /// Takes what was marked since, adds it to this epoch, and returns just that.
    ///
    /// # Errors
    /// [`TakeMoreError`]: nothing was taken.
    pub fn take_more(&mut self) -> Result<&TakenBitmap, TakeMoreError> {
        self.take_more_any()
    }
}

impl<K, B: Deref<Target = DirtyBitmap<K>>> Epoch<B, K> {
    /// Returns all marks that this epoch has taken so far.
    #[must_use]
    pub fn bitmap(&self) -> &TakenBitmap {
        &self.taken
    }

    /// Runs `commit`, and forgets the marks if it succeeds. If it fails, they are back in the bitmap.
    ///
    /// [`reclaim_epoch`](DirtyBitmap::reclaim_epoch) comes before, and nothing is committed, or it is refused until `commit` has
    /// returned. So no save commits whose pages a later one has saved, and may have saved to the same destination. `commit` makes
    /// durable what is then released: whatever it does without [waiting for the medium](Self::release) is the caller's choice.
    ///
    /// # Errors
    /// [`ReleaseError::Reclaimed`]: `commit` was not called. [`ReleaseError::Commit`]: it failed.
    pub fn release_after<T, E>(
        mut self,
        commit: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, ReleaseError<E>> {
        self.live.epochs.lock().begin_commit(&self.taken)?;
        // Dropped on the way, by an error or a panic, the epoch gives its marks back.
        let committed = commit().map_err(ReleaseError::Commit)?;
        self.end(false)?;
        Ok(committed)
    }

    /// Forgets the marks: the pages are durable.
    ///
    /// Nothing is checked: every page of [`bitmap`](Self::bitmap) must have been written after its mark was taken, so also what
    /// [`take_more`](Epoch::take_more) took last, and a full save must have begun after the epoch did.
    /// A save that may be reclaimed commits in [`release_after`](Self::release_after) instead.
    ///
    /// # Errors
    /// [`EpochReclaimed`] where [`reclaim_epoch`](DirtyBitmap::reclaim_epoch) has taken the marks back meanwhile. They stay in
    /// the bitmap.
    pub fn release(mut self) -> Result<(), EpochReclaimed> {
        self.end(false)
    }

    pub(crate) fn begin_any(live: B) -> Result<Self, BeginEpochError> {
        let mut epochs = live.epochs.lock();
        if epochs.open.is_some() {
            return Err(BeginEpochError::AlreadyOpen);
        }
        let taken = epochs.take(&live.marks);
        let taken = taken.map_err(BeginEpochError::OutOfMemory)?;
        taken.set_part(Part::first(taken.is_clean()));
        epochs.open = Some(Arc::clone(&taken));
        drop(epochs);
        Ok(Self {
            live,
            taken,
            more: None,
            kind: PhantomData,
        })
    }

    pub(crate) fn take_more_any(&mut self) -> Result<&TakenBitmap, TakeMoreError> {
        // Held until the marks are in `taken`: reclaimed in between, they would be in neither.
        let mut epochs = self.live.epochs.lock();
        if !epochs.has_open(&self.taken) {
            return Err(EpochReclaimed.into());
        }
        if let Some(before) = self.more.take() {
            epochs.keep(before);
        }
        let more = epochs.take(&self.live.marks)?;
        if let Some(before) = self.taken.part() {
            let part = before.more(more.is_clean());
            more.set_part(part);
            self.taken.set_part(part.and_before());
        }
        self.taken.marks.add(&more.marks);
        drop(epochs);
        Ok(self.more.insert(more))
    }

    /// The bitmap whose marks these are.
    pub(crate) fn live(&self) -> &B {
        &self.live
    }

    fn end(&mut self, give_back: bool) -> Result<(), EpochReclaimed> {
        let mut epochs = self.live.epochs.lock();
        if !epochs.has_open(&self.taken) {
            return Err(EpochReclaimed);
        }
        // Before another epoch can begin: it would miss them.
        if give_back {
            self.live.marks.add(&self.taken.marks);
        }
        epochs.open = None;
        epochs.committing = false;
        epochs.keep(Arc::clone(&self.taken));
        if let Some(more) = self.more.take() {
            epochs.keep(more);
        }
        Ok(())
    }
}

impl<K, B: Deref<Target = DirtyBitmap<K>>> Drop for Epoch<B, K> {
    fn drop(&mut self) {
        // Released or reclaimed, there is nothing to give back.
        let _ = self.end(true);
    }
}

/// The open epoch of a bitmap, and what is kept for the next.
pub(crate) struct Epochs {
    state: Mutex<State>,
    /// Whether a tracker has the bitmap. No mark depends on its order.
    pub(crate) tracked: AtomicBool,
}

pub(crate) struct State {
    /// The marks of the epoch that is neither released nor dropped nor reclaimed.
    open: Option<Arc<TakenBitmap>>,
    /// Whether the save of that epoch commits.
    committing: bool,
    /// Clean bitmaps.
    spares: Vec<Arc<TakenBitmap>>,
}

impl Epochs {
    pub(crate) fn reclaim(&self, live: &Marks) -> Result<bool, EpochCommitting> {
        let mut epochs = self.lock();
        if epochs.committing {
            return Err(EpochCommitting);
        }
        // Its value may still be read: it keeps its marks, and the bitmap has them too.
        let taken = epochs.open.take();
        if let Some(taken) = &taken {
            live.add(&taken.marks);
        }
        Ok(taken.is_some())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here leaves each mark in the live bitmap or in the epoch's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                open: None,
                committing: false,
                spares: Vec::new(),
            }),
            tracked: AtomicBool::new(false),
        }
    }
}

impl State {
    fn has_open(&self, taken: &Arc<TakenBitmap>) -> bool {
        self.open
            .as_ref()
            .is_some_and(|open| Arc::ptr_eq(open, taken))
    }

    /// From here on, the epoch is not reclaimed.
    fn begin_commit(&mut self, taken: &Arc<TakenBitmap>) -> Result<(), EpochReclaimed> {
        if !self.has_open(taken) {
            return Err(EpochReclaimed);
        }
        self.committing = true;
        Ok(())
    }

    /// Takes all marks out, into a spare if there is one of the present granule.
    fn take(&mut self, live: &Marks) -> Result<Arc<TakenBitmap>, GeometryError> {
        let spares = &mut self.spares;
        let clean = |shift: u32| {
            let found = spares.iter_mut().position(|spare| {
                // One that has ended may not have been dropped yet: it would take this for its own.
                Arc::get_mut(spare).is_some() && spare.marks.page_shift == shift
            });
            match found {
                Some(found) => Ok(spares.swap_remove(found)),
                None => {
                    Marks::clean(live.ram, shift).map(|marks| Arc::new(TakenBitmap::over(marks)))
                }
            }
        };
        live.take(clean, |taken| &taken.marks)
    }

    /// Keeps a bitmap that is no longer needed.
    fn keep(&mut self, taken: Arc<TakenBitmap>) {
        taken.marks.clear();
        // The newest are of the present granule.
        if self.spares.len() == SPARES {
            self.spares.remove(0);
        }
        self.spares.push(taken);
    }
}

/// An epoch could not begin. No mark was taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeginEpochError {
    /// Another epoch of this bitmap is neither released nor dropped.
    #[error(
        "another epoch of this bitmap is open: release or drop it first; if it was leaked or its save is stuck, \
         reclaim_epoch marks its pages dirty again"
    )]
    AlreadyOpen,
    /// There is no memory to hold the marks.
    #[error("the marks can't be taken out")]
    OutOfMemory(#[source] GeometryError),
}

/// An epoch could not be extended. No mark was taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TakeMoreError {
    /// The marks of the epoch were taken back.
    #[error(transparent)]
    Reclaimed(#[from] EpochReclaimed),
    /// There is no memory to hold the marks.
    #[error("the marks can't be taken out")]
    OutOfMemory(#[from] GeometryError),
}

/// The marks of an epoch were reclaimed while its save ran. They are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the marks of this epoch were reclaimed while its save ran: its pages are dirty again, so leave them to the next save"
)]
#[non_exhaustive]
pub struct EpochReclaimed;

/// The epoch can't be reclaimed any more: its save commits. Nothing was reclaimed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the save of the open epoch is being committed: wait until the commit has returned, which ends the epoch"
)]
#[non_exhaustive]
pub struct EpochCommitting;

/// The marks of an epoch were not forgotten. They are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ReleaseError<E> {
    /// The marks were reclaimed before the commit, and nothing was committed.
    #[error("nothing was committed")]
    Reclaimed(#[from] EpochReclaimed),
    /// The commit failed.
    #[error("the commit failed, and the marks of its epoch are back in the bitmap")]
    Commit(#[source] E),
}
