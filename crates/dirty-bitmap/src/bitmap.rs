//! A bitmap of a guest's RAM, and what may be done with it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

use crate::coverage::Part;
use crate::epoch::{BeginEpochError, Epoch, EpochCommitting, Epochs};
use crate::geometry::{DifferentRam, GeometryError, OutOfRange, Ram};
use crate::kind::{Markable, Taken, Tracked, Untracked};
use crate::marks::Marks;
use crate::runs::Runs;

/// Which pages of a range of guest RAM were written since their marks were last taken.
///
/// Marking is lock-free and takes `&self`: share the bitmap among vCPU and device threads in an
/// [`Arc`](std::sync::Arc), or by reference. Marking allocates nothing and takes no lock, so it may be done in a signal handler.
///
/// # Mark last
/// Whoever writes to guest memory on the host's side writes first and marks *then*: a drain that takes the mark sees the
/// write, and one that does not take it leaves the mark for the next.
///
/// A handler of write faults lifts the protection first, marks *then*, and lets the write go on last. Marking first loses a page: a
/// drain in between takes the mark and protects what is still protected, the page is copied, and the lifted protection lets the write through
/// unseen. Whoever drains protects again *after* draining and *before* copying, so that a later write faults, and marks, once more.
///
/// # Kinds
/// The type says who may take the marks out:
///
/// | type | marks are taken by |
/// |---|---|
/// | `DirtyBitmap` | [`begin_epoch`](Self::begin_epoch), [`drain`](Self::drain), [`drain_into`](Self::drain_into) |
/// | [`TrackedBitmap`] | the [`WriteTracker`](crate::WriteTracker) alone, which protects their pages again |
/// | [`TakenBitmap`] | nothing: an epoch has them, and may have to give them back |
///
/// All three are read alike, and all but the last are marked alike. Taking marks without protecting their pages again would lose the next write to each:
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::TrackedBitmap::tracked(0, 1 << 30, 4096).unwrap();
/// bitmap.begin_epoch(); // of a TrackedBitmap
/// ```
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::TrackedBitmap::tracked(0, 1 << 30, 4096).unwrap();
/// bitmap.drain(); // of a TrackedBitmap
/// ```
/// ```compile_fail,E0308
/// # let bitmap = dirty_bitmap::TrackedBitmap::tracked(0, 1 << 30, 4096).unwrap();
/// # let bitmap = std::sync::Arc::new(bitmap);
/// dirty_bitmap::Epoch::begin(bitmap); // of a TrackedBitmap
/// ```
/// Taking marks out of an epoch would leave it nothing to give back:
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// epoch.bitmap().drain();
/// ```
/// Marks that are added to an epoch's would be lost if it was reclaimed before:
/// ```compile_fail,E0277
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// bitmap.drain_into(epoch.bitmap());
/// ```
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// epoch.bitmap().set_dirty(0);
/// ```
///
/// # Units
/// Addresses are guest-physical, in bytes. [`page_size`](Self::page_size) is the page that indexes count, fixed for life.
/// [`granule`](Self::granule) is the size in which marks are kept at the moment: the page size until
/// [`rebuild`](Self::rebuild) changes it. The last page is cut where the RAM ends.
///
/// # Memory
/// One bit per granule and a 64th of that; a rebuilt bitmap keeps the bits of every granule that it ever had, because a
/// marker may still hold them: all together less than twice the bits of the finest. An epoch has as many bits as the bitmap,
/// and so has each [`take_more`](crate::Epoch::take_more). The host gives memory for those parts only that marks were in. Up
/// to two of them are kept for the next epoch, so that it allocates nothing while the guest is paused.
///
/// # Examples
/// ```
/// use dirty_bitmap::DirtyBitmap;
///
/// let bitmap = DirtyBitmap::new(0x8000_0000, 64 << 20, 16 << 10)?;
/// assert!(bitmap.set_dirty(0x8000_4123)?); // clean until now
/// assert!(!bitmap.set_dirty(0x8000_4567)?); // the same page again
/// assert_eq!(bitmap.runs().collect::<Vec<_>>(), [0x4000..0x8000]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DirtyBitmap<K = Untracked> {
    pub(crate) marks: Marks,
    pub(crate) epochs: Epochs,
    /// Of which part of an epoch these are the marks, if they are. No mark depends on its order.
    part: Mutex<Option<Part>>,
    kind: PhantomData<fn() -> K>,
}

/// A bitmap whose marks only a [`WriteTracker`](crate::WriteTracker) takes.
pub type TrackedBitmap = DirtyBitmap<Tracked>;

/// Marks that an epoch has taken.
pub type TakenBitmap = DirtyBitmap<Taken>;

impl DirtyBitmap {
    /// A clean bitmap over the `ram_size` bytes of guest-physical memory from `ram_start` on, in pages of `page_size` bytes.
    ///
    /// Where the RAM has several ranges, let the bitmap cover the memory file instead: `ram_start` 0, and every address
    /// translated to its offset.
    ///
    /// # Errors
    /// [`GeometryError`]: no RAM, or more than [`MAX_RAM_SIZE`](crate::MAX_RAM_SIZE); a page size that is no power of two or larger than
    /// the RAM; no memory for the bits.
    pub fn new(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Self, GeometryError> {
        new_marks(ram_start, ram_size, page_size).map(Self::over)
    }

    /// Takes all marks out, into a new bitmap of the present granule.
    ///
    /// Taken marks are the caller's to keep: where the pages are about to be saved, [`begin_epoch`](Self::begin_epoch) keeps
    /// them until the save has succeeded.
    ///
    /// # Errors
    /// [`GeometryError::OutOfMemory`]: nothing was taken.
    pub fn drain(&self) -> Result<Self, GeometryError> {
        let clean = |shift| Marks::clean(self.marks.ram, shift);
        Ok(Self::over(self.marks.take(clean, |marks| marks)?))
    }

    /// Takes all marks out and adds them to `other`, which may have any granule.
    ///
    /// # Errors
    /// [`DifferentRam`] where `other` covers other addresses: nothing was moved.
    pub fn drain_into<K: Markable>(&self, other: &DirtyBitmap<K>) -> Result<(), DifferentRam> {
        let (this, that) = (self.marks.ram, other.marks.ram);
        if this != that {
            return Err(DifferentRam {
                this_start: this.start,
                this_size: this.size,
                other_start: that.start,
                other_size: that.size,
            });
        }
        // Marking takes no lock: a bitmap drained into itself, or two into each other, can't deadlock.
        self.marks
            .take_runs(|run| _ = other.marks.mark_offsets(run));
        Ok(())
    }

    /// Takes all marks out into an [`Epoch`], which gives them back unless it is [released](Epoch::release).
    ///
    /// # Errors
    /// [`BeginEpochError`] while another epoch holds marks of this bitmap.
    pub fn begin_epoch(&self) -> Result<Epoch<&Self>, BeginEpochError> {
        Epoch::begin(self)
    }

    /// Takes the marks of the open epoch back, and says whether there was one. The next epoch can begin then.
    ///
    /// This is for an epoch that never ends: its value was leaked, or its thread is stuck. If the save is alive after all, no mark
    /// is lost: its pages are marked, so the next save has them too, and [`Epoch::release`] reports
    /// [`EpochReclaimed`](crate::EpochReclaimed).
    ///
    /// A save that is alive may still commit, and replace at the same destination what the next save has put there: its pages
    /// are then in no file. [`Epoch::release_after`] prevents this: it commits nothing once the epoch was reclaimed. Where a
    /// save commits on its own and calls [`Epoch::release`], give every save its own destination.
    ///
    /// # Errors
    /// [`EpochCommitting`] while `release_after` runs its commit: nothing was reclaimed. The commit ends the epoch, by success or by failure.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.epochs.reclaim(&self.marks)
    }
}

impl TrackedBitmap {
    /// A clean bitmap like that of [`DirtyBitmap::new`], to be marked by a [`WriteTracker`](crate::WriteTracker) and whoever
    /// else writes the RAM.
    ///
    /// # Errors
    /// As [`DirtyBitmap::new`].
    pub fn tracked(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Self, GeometryError> {
        new_marks(ram_start, ram_size, page_size).map(Self::over)
    }
}

fn new_marks(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Marks, GeometryError> {
    let ram = Ram::new(ram_start, ram_size, page_size)?;
    Marks::clean(ram, page_size.trailing_zeros())
}

impl<K> DirtyBitmap<K> {
    pub(crate) fn over(marks: Marks) -> Self {
        Self {
            marks,
            epochs: Epochs::default(),
            part: Mutex::new(None),
            kind: PhantomData,
        }
    }

    /// The first guest-physical address covered.
    #[must_use]
    pub fn ram_start(&self) -> u64 {
        self.marks.ram.start
    }

    /// The bytes covered.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.marks.ram.size
    }

    /// The page that indexes count, in bytes: what [`new`](Self::new) was given.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.marks.page_shift
    }

    /// The size in which marks are kept at the moment, in bytes.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.marks.shift()
    }

    /// Whether the page that holds the guest-physical `address` is marked.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn is_dirty(&self, address: u64) -> Result<bool, OutOfRange> {
        let (offsets, verdict) = self.marks.ram.clip(address, 1);
        verdict?;
        let moving = self.marks.lock();
        let shift = moving.shift();
        Ok(self.marks.table(shift).is_marked(offsets.start >> shift))
    }

    /// Whether no page is marked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let moving = self.marks.lock();
        self.marks.table(moving.shift()).is_clean()
    }

    /// The bytes of all marked granules; the last one counts as far as the RAM goes.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        let moving = self.marks.lock();
        let shift = moving.shift();
        let table = self.marks.table(shift);
        let mut bytes = 0;
        // Each word is read once: what is counted and what is cut is one state, also while threads mark.
        for word in table.marked_words(0) {
            self.marks.each_run(shift, word, table.word(word), |run| {
                bytes += run.end - run.start;
            });
        }
        bytes
    }

    /// The runs of marked pages, ascending, as byte offsets from the start of the RAM, as long as they can be.
    ///
    /// The bitmap may be marked, drained and rebuilt meanwhile: then the runs are those of no single moment, but every
    /// page that stayed marked all the time is in one of them.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.marks)
    }

    pub(crate) fn part(&self) -> Option<Part> {
        *self.part.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_part(&self, part: Part) {
        *self.part.lock().unwrap_or_else(PoisonError::into_inner) = Some(part);
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Marks the page that holds the guest-physical `address`. True if its granule was clean.
    ///
    /// # Errors
    /// [`OutOfRange`]: nothing is marked.
    #[inline]
    pub fn set_dirty(&self, address: u64) -> Result<bool, OutOfRange> {
        self.marks.mark_address(address)
    }

    /// Marks page number `index`, counted from the start of the RAM in [`page_size`](Self::page_size)s, whatever the granule is now. True if any of it
    /// was clean.
    ///
    /// # Errors
    /// [`OutOfRange`]: nothing is marked.
    pub fn set_dirty_by_index(&self, index: u64) -> Result<bool, OutOfRange> {
        let page_size = self.page_size();
        let start = index
            .checked_mul(page_size)
            .filter(|start| *start < self.marks.ram.size);
        let Some(start) = start else {
            let start = self
                .marks
                .ram
                .start
                .saturating_add(index.saturating_mul(page_size));
            return Err(self
                .marks
                .ram
                .out_of_range(start, start.saturating_add(page_size)));
        };
        Ok(self
            .marks
            .mark_offsets(start..self.marks.ram.size.min(start + page_size)))
    }

    /// Marks every page that the `len` bytes from the guest-physical `address` on touch; none for 0 bytes. True if any of them was clean.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte lies outside the RAM. What lies inside is marked all the same.
    pub fn set_range(&self, address: u64, len: u64) -> Result<bool, OutOfRange> {
        let (inside, verdict) = self.marks.ram.clip(address, len);
        let was_clean = !inside.is_empty() && self.marks.mark_offsets(inside);
        verdict.map(|()| was_clean)
    }

    /// Goes over to pages of `granule` bytes, any power of two: a mark on a coarser page becomes marks on all finer ones in it, a mark on a
    /// finer page one on the coarser page around it. Threads may mark meanwhile; no mark is lost.
    ///
    /// # Errors
    /// [`GeometryError`]: a granule that is no power of two or larger than the RAM, or no memory; the bitmap stays as it was.
    pub fn rebuild(&self, granule: u64) -> Result<(), GeometryError> {
        self.marks.rebuild(granule)
    }
}

impl<K> fmt::Debug for DirtyBitmap<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("ram_start", &self.ram_start())
            .field("ram_size", &self.ram_size())
            .field("page_size", &self.page_size())
            .field("granule", &self.granule())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}
