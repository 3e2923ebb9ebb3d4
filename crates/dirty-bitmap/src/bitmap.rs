//! The live bitmap: marked by many threads, drained and rebuilt by one at a time.

use std::fmt;
use std::ops::Range;
use std::sync::{OnceLock, PoisonError};

use crate::epoch::{BeginEpochError, Epoch};
use crate::geometry::{DifferentRam, GeometryError, OutOfRange, Ram};
use crate::runs::Runs;
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use crate::table::Table;

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
/// # Units
/// Addresses are guest-physical, in bytes. [`page_size`](Self::page_size) is the page that indexes count, fixed for life.
/// [`granule`](Self::granule) is the size in which marks are kept at the moment: the page size until
/// [`rebuild`](Self::rebuild) changes it. The last page is cut where the RAM ends.
///
/// # Memory
/// One bit per granule and a 64th of that; a rebuilt bitmap keeps the bits of every granule that it ever had, because a
/// marker may still hold them: all together less than twice the bits of the finest.
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
pub struct DirtyBitmap {
    ram: Ram,
    page_shift: u32,
    /// Which of the tables marks go to.
    current: AtomicU64,
    /// The table of the page size, one step nearer for marks than those of other granules.
    pages: Table,
    /// The others, by the binary logarithm of their granule. Made once, never freed: a marker may hold any of them.
    rebuilt: Box<[OnceLock<Table>]>,
    /// What `current` says, for whoever moves marks or looks for them: one at a time, so that no mark is missed on its way
    /// between tables.
    moving: Mutex<Published>,
    pub(crate) epoch_open: AtomicBool,
}

/// Which table marks go to, as one word: the logarithm of its granule in the low byte, above it how often this changed.
/// The count tells a marker of a change also when the bitmap is back at the granule that the marker saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Published(u64);

impl Published {
    fn first(shift: u32) -> Self {
        Self(u64::from(shift))
    }

    fn next(self, shift: u32) -> Self {
        Self(((self.0 >> 8) + 1) << 8 | u64::from(shift))
    }

    pub(crate) fn shift(self) -> u32 {
        (self.0 & 0xff) as u32
    }
}

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
        let ram = Ram::new(ram_start, ram_size, page_size)?;
        Self::clean(ram, page_size.trailing_zeros())
    }

    fn clean(ram: Ram, shift: u32) -> Result<Self, GeometryError> {
        Ok(Self {
            ram,
            page_shift: shift,
            current: AtomicU64::new(Published::first(shift).0),
            pages: Table::new(ram.pages(shift))?,
            rebuilt: (0..u64::BITS).map(|_| OnceLock::new()).collect(),
            moving: Mutex::new(Published::first(shift)),
            epoch_open: AtomicBool::new(false),
        })
    }

    /// The first guest-physical address covered.
    #[must_use]
    pub fn ram_start(&self) -> u64 {
        self.ram.start
    }

    /// The bytes covered.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram.size
    }

    /// The page that indexes count, in bytes: what [`new`](Self::new) was given.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// The size in which marks are kept at the moment, in bytes.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.published().shift()
    }

    /// Marks the page that holds the guest-physical `address`. True if its granule was clean.
    ///
    /// # Errors
    /// [`OutOfRange`]: nothing is marked.
    #[inline]
    pub fn set_dirty(&self, address: u64) -> Result<bool, OutOfRange> {
        let offset = self.offset_of(address)?;
        Ok(self.mark(|table, shift| table.mark_page(offset >> shift)))
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
            .filter(|start| *start < self.ram.size);
        let Some(start) = start else {
            let start = self
                .ram
                .start
                .saturating_add(index.saturating_mul(page_size));
            return Err(self
                .ram
                .out_of_range(start, start.saturating_add(page_size)));
        };
        Ok(self.mark_offsets(start..self.ram.size.min(start + page_size)))
    }

    /// Marks every page that the `len` bytes from the guest-physical `address` on touch; none for 0 bytes. True if any of them was clean.
    ///
    /// # Errors
    /// [`OutOfRange`] where any byte lies outside the RAM. What lies inside is marked all the same.
    pub fn set_range(&self, address: u64, len: u64) -> Result<bool, OutOfRange> {
        let (inside, verdict) = self.ram.clip(address, len);
        let was_clean = !inside.is_empty() && self.mark_offsets(inside);
        verdict.map(|()| was_clean)
    }

    /// Whether the page that holds the guest-physical `address` is marked.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn is_dirty(&self, address: u64) -> Result<bool, OutOfRange> {
        let (offsets, verdict) = self.ram.clip(address, 1);
        verdict?;
        let moving = self.lock();
        let shift = moving.shift();
        Ok(self.table(shift).is_marked(offsets.start >> shift))
    }

    /// Whether no page is marked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let moving = self.lock();
        self.table(moving.shift()).is_clean()
    }

    /// The bytes of all marked granules; the last one counts as far as the RAM goes.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        let moving = self.lock();
        let shift = moving.shift();
        let table = self.table(shift);
        let mut bytes = 0;
        // Each word is read once: what is counted and what is cut is one state, also while threads mark.
        for word in table.marked_words(0) {
            self.each_run(shift, word, table.word(word), |run| {
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
        Runs::new(self)
    }

    /// Takes all marks out, into a new bitmap of the present granule.
    ///
    /// Taken marks are the caller's to keep: where the pages are about to be saved, [`begin_epoch`](Self::begin_epoch) keeps
    /// them until the save has succeeded.
    ///
    /// # Errors
    /// [`GeometryError::OutOfMemory`]: nothing was taken.
    pub fn drain(&self) -> Result<Self, GeometryError> {
        let moving = self.lock();
        let shift = moving.shift();
        let taken = Self::clean(self.ram, shift)?;
        let table = taken.table(shift);
        self.table(shift).take(|word, bits| {
            table.mark_word(word, bits);
        });
        Ok(taken)
    }

    /// Takes all marks out and adds them to `other`, which may have any granule.
    ///
    /// # Errors
    /// [`DifferentRam`] where `other` covers other addresses: nothing was moved.
    pub fn drain_into(&self, other: &Self) -> Result<(), DifferentRam> {
        if self.ram != other.ram {
            return Err(DifferentRam {
                this_start: self.ram.start,
                this_size: self.ram.size,
                other_start: other.ram.start,
                other_size: other.ram.size,
            });
        }
        let moving = self.lock();
        let shift = moving.shift();
        // Marking takes no lock: a bitmap drained into itself, or two into each other, can't deadlock.
        self.table(shift)
            .take(|word, bits| self.each_run(shift, word, bits, |run| _ = other.mark_offsets(run)));
        Ok(())
    }

    /// Takes all marks out into an [`Epoch`], which gives them back unless it is [released](Epoch::release).
    ///
    /// # Errors
    /// [`BeginEpochError`] while another epoch holds marks of this bitmap.
    pub fn begin_epoch(&self) -> Result<Epoch<&Self>, BeginEpochError> {
        Epoch::begin(self)
    }

    /// Goes over to pages of `granule` bytes, any power of two: a mark on a coarser page becomes marks on all finer ones in it, a mark on a
    /// finer page one on the coarser page around it. Threads may mark meanwhile; no mark is lost.
    ///
    /// # Errors
    /// [`GeometryError`]: a granule that is no power of two or larger than the RAM, or no memory; the bitmap stays as it was.
    pub fn rebuild(&self, granule: u64) -> Result<(), GeometryError> {
        let to = self.ram.shift_of(granule)?;
        let mut moving = self.lock();
        let from = moving.shift();
        if from == to {
            return Ok(());
        }
        let table = self.table_or_new(to)?;
        // Marks that came too late for an earlier rebuilding: whoever set them saw that, and set them again where they count.
        table.take(|_, _| ());
        // Published before the old table is swept: a marker that misses the sweep finds the new table when it looks again.
        *moving = moving.next(to);
        self.current.store(moving.0, Ordering::Release);
        self.table(from).take(|word, bits| {
            self.each_run(from, word, bits, |run| {
                _ = table.mark(pages_touched(&run, to))
            });
        });
        Ok(())
    }

    /// The offset of a guest-physical address from the start of the RAM.
    #[inline]
    pub(crate) fn offset_of(&self, address: u64) -> Result<u64, OutOfRange> {
        // Below the start, it wraps to an offset past the end.
        let offset = address.wrapping_sub(self.ram.start);
        if offset >= self.ram.size {
            return Err(self.ram.out_of_range(address, address.saturating_add(1)));
        }
        Ok(offset)
    }

    /// Marks the granules that `offsets`, not empty and inside the RAM, touch. True if any of them was clean.
    pub(crate) fn mark_offsets(&self, offsets: Range<u64>) -> bool {
        self.mark(|table, shift| table.mark(pages_touched(&offsets, shift)))
    }

    /// Has `set` mark in the table that marks go to, of granules of 1 << shift bytes, until that is still the one. True if `set` ever was.
    #[inline]
    fn mark(&self, set: impl Fn(&Table, u32) -> bool) -> bool {
        let published = self.published();
        let was_clean = set(self.table(published.shift()), published.shift());
        // Rebuilt since: the mark may have come after the sweep of the table it went to.
        let now = self.published();
        if now == published {
            return was_clean;
        }
        self.mark_again(now, set) | was_clean
    }

    /// [`mark`](Self::mark), once more where marks go to now.
    #[cold]
    fn mark_again(&self, mut published: Published, set: impl Fn(&Table, u32) -> bool) -> bool {
        let mut was_clean = false;
        loop {
            was_clean |= set(self.table(published.shift()), published.shift());
            let now = self.published();
            if now == published {
                return was_clean;
            }
            published = now;
        }
    }

    /// Calls `each` with the byte offsets of every run of marks in a word.
    fn each_run(&self, shift: u32, word: usize, mut bits: u64, mut each: impl FnMut(Range<u64>)) {
        let base = word as u64 * u64::from(u64::BITS);
        while bits != 0 {
            let start = bits.trailing_zeros();
            let len = (bits >> start).trailing_ones();
            each(self.offsets_of(
                base + u64::from(start)..base + u64::from(start + len),
                shift,
            ));
            bits &= !(u64::MAX >> (u64::BITS - len) << start);
        }
    }

    /// The byte offsets of `pages`, cut where the RAM ends.
    pub(crate) fn offsets_of(&self, pages: Range<u64>, shift: u32) -> Range<u64> {
        pages.start << shift..(pages.end << shift).min(self.ram.size)
    }

    /// Keeps marks from being moved: all of them are in one table meanwhile.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Published> {
        // Nothing is left half-done by a panic in here: a move that stops leaves the rest where it was.
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(crate) fn table(&self, shift: u32) -> &Table {
        if shift == self.page_shift {
            return &self.pages;
        }
        self.rebuilt[shift as usize]
            .get()
            .expect("a table is made before it is published")
    }

    fn table_or_new(&self, shift: u32) -> Result<&Table, GeometryError> {
        let slot = &self.rebuilt[shift as usize];
        if shift != self.page_shift && slot.get().is_none() {
            let table = Table::new(self.ram.pages(shift))?;
            // Only the holder of the lock makes tables.
            let made = slot.set(table);
            debug_assert!(made.is_ok());
        }
        Ok(self.table(shift))
    }

    #[inline]
    fn published(&self) -> Published {
        Published(self.current.load(Ordering::Acquire))
    }
}

/// The numbers of the pages of `1 << shift` bytes that `offsets`, not empty, touch.
pub(crate) fn pages_touched(offsets: &Range<u64>, shift: u32) -> Range<u64> {
    offsets.start >> shift..((offsets.end - 1) >> shift) + 1
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("ram_start", &self.ram.start)
            .field("ram_size", &self.ram.size)
            .field("page_size", &self.page_size())
            .field("granule", &self.granule())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_table_that_is_published_again_is_told_from_what_it_was_before() {
        let mut seen = vec![Published::first(12)];
        for shift in [14, 12].repeat(10) {
            let next = seen[seen.len() - 1].next(shift);
            assert_eq!(next.shift(), shift);
            assert!(!seen.contains(&next), "{next:?}");
            seen.push(next);
        }
    }

    #[test]
    fn a_page_marked_first_while_the_bitmap_is_rebuilt_was_clean_whichever_table_says_so() {
        for tables in 0..8_u32 {
            let bitmap = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
            let times = Cell::new(0);
            let was_clean = bitmap.mark(|_, _| {
                let time = times.replace(times.get() + 1);
                if time < 2 {
                    bitmap.rebuild(8192 << time).unwrap();
                }
                tables >> time & 1 != 0
            });
            assert_eq!((was_clean, times.get()), (tables != 0, 3), "{tables:03b}");
        }
    }
}
