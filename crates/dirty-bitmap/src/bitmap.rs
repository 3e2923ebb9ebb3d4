//! The bitmap of a guest's RAM and its public interface.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};

use crate::coverage::TakeRange;
use crate::epoch::{BeginEpochError, Epoch, EpochCommitting, Epochs};
use crate::geometry::{GeometryError, OutOfRange, RamRange, RangeMismatch};
use crate::kind::{Logged, Markable, Taken, Tracked, Untracked};
use crate::marks::Marks;
use crate::parent::{Parent, ParentImage};
use crate::runs::Runs;

/// A bitmap of the pages of guest RAM that were written since their marks were last taken.
///
/// Marking is lock-free and takes `&self`. Share the bitmap among vCPU and device threads in an
/// [`Arc`](std::sync::Arc) or by reference. Marking does not allocate and takes no lock, so a
/// signal handler may do it.
///
/// # Mark last
/// Host code that writes to guest memory writes first and marks *afterwards*. A drain that takes
/// the mark then sees the write. A drain that does not take it leaves the mark for the next drain.
///
/// A handler of write faults unprotects the page, *then* marks it, *then* resumes the write. The
/// thread that drains protects the pages *after* draining and *before* copying, so that a later
/// write faults and marks again.
///
/// Marking before unprotecting loses a page:
/// 1. The handler marks the page.
/// 2. Another thread drains the mark, protects the page, and copies it.
/// 3. The handler unprotects the page and resumes the write. The page changes, and has no mark.
///
/// # Kinds
/// The type states how the marks are taken:
/// - `DirtyBitmap`: by [`begin_epoch`](Self::begin_epoch), [`drain`](Self::drain) and
///   [`drain_into`](Self::drain_into).
/// - [`TrackedBitmap`]: only by the [`WriteTracker`](crate::WriteTracker), which protects the pages
///   again.
/// - [`LoggedBitmap`]: only by a [`LoggedEpoch`](crate::LoggedEpoch), which moves a hypervisor's
///   dirty log into the bitmap first.
/// - [`TakenBitmap`]: not at all. An epoch holds these marks and may have to restore them.
///
/// All have the same methods for reading, and all except the last the same methods for marking.
/// Taking marks without protecting their pages again would lose the next write to each page:
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
/// Taking marks before the log was moved into the bitmap would leave out the pages in the log:
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::LoggedBitmap::logged(0, 1 << 30, 4096).unwrap();
/// bitmap.begin_epoch(); // of a LoggedBitmap
/// ```
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::LoggedBitmap::logged(0, 1 << 30, 4096).unwrap();
/// bitmap.drain(); // of a LoggedBitmap
/// ```
/// ```compile_fail,E0308
/// # let bitmap = dirty_bitmap::LoggedBitmap::logged(0, 1 << 30, 4096).unwrap();
/// # let bitmap = std::sync::Arc::new(bitmap);
/// dirty_bitmap::Epoch::begin(bitmap); // of a LoggedBitmap
/// ```
/// An epoch whose marks were taken could not restore them:
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// epoch.bitmap().drain();
/// ```
/// A mark added to an epoch that was already reclaimed would be lost:
/// ```compile_fail,E0277
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// bitmap.drain_into(epoch.bitmap());
/// ```
/// ```compile_fail,E0599
/// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 30, 4096).unwrap();
/// let epoch = bitmap.begin_epoch().unwrap();
/// epoch.bitmap().mark(0);
/// ```
///
/// # Units
/// Addresses are guest-physical, in bytes. [`page_size`](Self::page_size) is the unit of page
/// indexes, and never changes. [`granule`](Self::granule) is the number of bytes that one mark
/// stands for. It is the page size until [`rebuild`](Self::rebuild) changes it. The last page ends
/// where the RAM ends.
///
/// # Memory
/// A bitmap needs one bit for each granule, and 1/64 more. A rebuilt bitmap keeps the bits of every
/// earlier granule, because a marker may still hold them. Together they are less than twice the
/// bits of the finest granule.
///
/// An epoch has as many bits as the bitmap, and so has each [`extend`](crate::Epoch::extend).
/// The host provides memory only for the parts that had marks. Up to two of these bitmaps are kept
/// for the next epoch, so that it does not allocate while the guest is paused.
///
/// # Examples
/// ```
/// use dirty_bitmap::DirtyBitmap;
///
/// let bitmap = DirtyBitmap::new(0x8000_0000, 64 << 20, 16 << 10)?;
/// assert!(bitmap.mark(0x8000_4123)?); // clean until now
/// assert!(!bitmap.mark(0x8000_4567)?); // the same page again
/// assert_eq!(bitmap.runs().collect::<Vec<_>>(), [0x4000..0x8000]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a bitmap that is dropped discards its marks: save their pages"]
pub struct DirtyBitmap<K = Untracked> {
    pub(crate) marks: Marks,
    pub(crate) epochs: Epochs,
    /// The takes of an epoch that these marks are from, if any. No mark depends on the ordering of
    /// this value.
    takes: Mutex<Option<TakeRange>>,
    pub(crate) parent: Parent,
    kind: PhantomData<fn() -> K>,
}

/// A bitmap whose marks only a [`WriteTracker`](crate::WriteTracker) takes.
pub type TrackedBitmap = DirtyBitmap<Tracked>;

/// A bitmap into which a hypervisor's dirty log is moved, and whose marks only a
/// [`LoggedEpoch`](crate::LoggedEpoch) takes.
///
/// The bitmap of a `GuestRam` (crates `guest-ram` and `kvm-backend`) takes offsets in the memory
/// file, which differ from guest-physical addresses behind a gap of the layout. To mark
/// guest-physical addresses, call `GuestRam::mark`.
pub type LoggedBitmap = DirtyBitmap<Logged>;

/// A bitmap of the marks that an epoch has taken.
pub type TakenBitmap = DirtyBitmap<Taken>;

impl DirtyBitmap {
    /// Creates a clean bitmap of the `ram_size` bytes of guest-physical memory from `ram_start` on,
    /// in pages of `page_size` bytes.
    ///
    /// For RAM with several ranges, let the bitmap cover the memory file instead: pass 0 as
    /// `ram_start`, and translate every address to its offset.
    ///
    /// # Errors
    /// Returns [`GeometryError`] if the RAM is empty or larger than
    /// [`MAX_RAM_SIZE`](crate::MAX_RAM_SIZE), if the page size is not a power of two or is larger
    /// than the RAM, or if memory for the bitmap can't be allocated.
    pub fn new(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Self, GeometryError> {
        new_marks(ram_start, ram_size, page_size).map(Self::over)
    }

    /// Moves all marks to a new bitmap of the current granule, and returns it.
    ///
    /// The caller is responsible for the marks. To save their pages, use
    /// [`begin_epoch`](Self::begin_epoch), which keeps them until the save has succeeded. To copy
    /// the marks, use [`mark_all`](Self::mark_all).
    ///
    /// The compiler warns if the result is dropped, which would lose the marks:
    /// ```compile_fail
    /// #![deny(unused_must_use)]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 4096)?;
    /// bitmap.drain()?;
    /// # Ok(())
    /// # }
    /// ```
    /// ```
    /// # #![deny(unused_must_use)]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 4096)?;
    /// let taken = bitmap.drain()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Returns [`GeometryError::OutOfMemory`]. No mark was taken.
    pub fn drain(&self) -> Result<Self, GeometryError> {
        let clean = |shift| Marks::clean(self.marks.ram, shift);
        let taken = self.marks.take(clean, |marks| marks)?;
        self.parent.set(ParentImage::Unknown);
        Ok(Self::over(taken))
    }

    /// Moves all marks to `other`, which may have any granule.
    ///
    /// # Errors
    /// Returns [`RangeMismatch`] if `other` covers other addresses. Nothing was moved.
    pub fn drain_into<K: Markable>(&self, other: &DirtyBitmap<K>) -> Result<(), RangeMismatch> {
        self.marks.ram.check_same(other.marks.ram)?;
        // Marking takes no lock. Therefore draining a bitmap into itself, or two into each other,
        // can't deadlock.
        self.marks
            .take_runs(|run| _ = other.marks.mark_offsets(run));
        self.parent.set(ParentImage::Unknown);
        Ok(())
    }

    /// Moves all marks to an [`Epoch`], which restores them unless it is
    /// [released](Epoch::release).
    ///
    /// # Errors
    /// Returns [`BeginEpochError`] if another epoch holds marks of this bitmap, or if memory for
    /// the marks can't be allocated.
    pub fn begin_epoch(&self) -> Result<Epoch<&Self>, BeginEpochError> {
        Epoch::begin(self)
    }

    /// Restores the marks of the open epoch, so that the next epoch can begin. Returns whether
    /// there was an open epoch.
    ///
    /// This is for an epoch that never ends, because its value was leaked or its thread is stuck.
    /// If the save is running after all, no mark is lost: the pages are marked, the next save
    /// includes them, and [`Epoch::release`] fails ([`EpochReclaimed`](crate::EpochReclaimed)).
    ///
    /// A save that is running after all may still commit. At a shared destination, it would replace
    /// the file of the next save, whose pages would then be in no file. [`Epoch::release_after`]
    /// prevents this: it commits nothing after the epoch was reclaimed. A save that commits on its
    /// own and then calls [`Epoch::release`] needs a destination of its own.
    ///
    /// # Errors
    /// Returns [`EpochCommitting`] while `release_after` runs its commit. Nothing was reclaimed.
    /// The commit ends the epoch, whether it succeeds or fails.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.epochs.reclaim(&self.marks)
    }
}

impl TrackedBitmap {
    /// Creates a clean bitmap as [`DirtyBitmap::new`] does, for use with a
    /// [`WriteTracker`](crate::WriteTracker).
    ///
    /// The tracker marks the writes of the guest. All other code that writes the RAM marks its own
    /// writes.
    ///
    /// # Errors
    /// Returns the same errors as [`DirtyBitmap::new`].
    pub fn tracked(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Self, GeometryError> {
        new_marks(ram_start, ram_size, page_size).map(Self::over)
    }
}

impl LoggedBitmap {
    /// Creates a clean bitmap as [`DirtyBitmap::new`] does, for a hypervisor with a dirty log.
    ///
    /// The log has the writes of the guest. All other code that writes the RAM marks its own
    /// writes.
    ///
    /// # Errors
    /// Returns the same errors as [`DirtyBitmap::new`].
    pub fn logged(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Self, GeometryError> {
        new_marks(ram_start, ram_size, page_size).map(Self::over)
    }

    /// Restores the marks of the open epoch, so that the next epoch can begin. Returns whether
    /// there was an open epoch.
    ///
    /// See [`DirtyBitmap::reclaim_epoch`](DirtyBitmap#method.reclaim_epoch).
    ///
    /// # Errors
    /// Returns [`EpochCommitting`] while the save commits. Nothing was reclaimed.
    pub fn reclaim_epoch(&self) -> Result<bool, EpochCommitting> {
        self.epochs.reclaim(&self.marks)
    }
}

fn new_marks(ram_start: u64, ram_size: u64, page_size: u64) -> Result<Marks, GeometryError> {
    let ram = RamRange::new(ram_start, ram_size, page_size)?;
    Marks::clean(ram, page_size.trailing_zeros())
}

impl<K> DirtyBitmap<K> {
    pub(crate) fn over(marks: Marks) -> Self {
        Self {
            marks,
            epochs: Epochs::default(),
            takes: Mutex::new(None),
            parent: Parent::default(),
            kind: PhantomData,
        }
    }

    /// Returns the first guest-physical address of the RAM.
    #[must_use]
    pub fn ram_start(&self) -> u64 {
        self.marks.ram.start
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.marks.ram.size
    }

    /// Returns the page size in bytes, which is the unit of page indexes. It was passed to
    /// [`new`](Self::new).
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.marks.page_shift
    }

    /// Returns the number of bytes that one mark currently stands for.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.marks.shift()
    }

    /// Returns whether the granule that holds the guest-physical `address` is marked.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if `address` is outside the RAM.
    pub fn is_dirty(&self, address: u64) -> Result<bool, OutOfRange> {
        let (offsets, inside) = self.marks.ram.clip(address, 1);
        inside?;
        let generation = self.marks.lock();
        let shift = generation.shift();
        Ok(self.marks.table(shift).is_marked(offsets.start >> shift))
    }

    /// Returns whether no page is marked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let generation = self.marks.lock();
        self.marks.table(generation.shift()).is_clean()
    }

    /// Returns the number of bytes in all marked granules. The last granule ends where the RAM
    /// ends.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        let generation = self.marks.lock();
        let shift = generation.shift();
        let table = self.marks.table(shift);
        let mut bytes = 0;
        // Each word is read once, so that its count is consistent while threads mark.
        for word in table.marked_words(0) {
            self.marks
                .for_each_run(shift, word, table.word(word), |run| {
                    bytes += run.end - run.start;
                });
        }
        bytes
    }

    /// Returns the maximal runs of marked pages in ascending order, as byte offsets from the start
    /// of the RAM.
    ///
    /// The bitmap may be marked, drained and rebuilt during the iteration. The runs are then not a
    /// point-in-time copy, but every page that stays marked throughout is in one of them.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.marks)
    }

    pub(crate) fn takes(&self) -> Option<TakeRange> {
        *self.takes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_takes(&self, takes: TakeRange) {
        *self.takes.lock().unwrap_or_else(PoisonError::into_inner) = Some(takes);
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Changes the granule to `granule` bytes, which may be any power of two up to the size of the
    /// RAM.
    ///
    /// A mark on a coarse page becomes marks on all finer pages in it. A mark on a fine page
    /// becomes a mark on the coarser page around it. Threads may mark during the change, and no
    /// mark is lost.
    ///
    /// # Errors
    /// Returns [`GeometryError`] if the granule is not a power of two or is larger than the RAM, or
    /// if memory for the bitmap can't be allocated. The bitmap is unchanged.
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
