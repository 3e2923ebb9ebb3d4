//! The tables of a bitmap: marked by many threads, emptied and rebuilt by one at a time.

use std::ops::Range;
use std::sync::{OnceLock, PoisonError};

use crate::geometry::{GeometryError, OutOfRange, Ram};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::table::Table;

/// The marks of a range of RAM, in one table for each granule that they ever had.
pub(crate) struct Marks {
    pub(crate) ram: Ram,
    pub(crate) page_shift: u32,
    /// Which of the tables marks go to.
    current: AtomicU64,
    /// The table of the page size, one step nearer for marks than those of other granules.
    pages: Table,
    /// The others, by the binary logarithm of their granule. Made once, never freed: a marker may hold any of them.
    rebuilt: Box<[OnceLock<Table>]>,
    /// What `current` says, for whoever moves marks or looks for them: one at a time, so that no mark is missed on its way
    /// between tables.
    moving: Mutex<Published>,
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

impl Marks {
    /// No marks, in pages of `1 << shift` bytes.
    pub(crate) fn clean(ram: Ram, shift: u32) -> Result<Self, GeometryError> {
        Ok(Self {
            ram,
            page_shift: shift,
            current: AtomicU64::new(Published::first(shift).0),
            pages: Table::new(ram.pages(shift))?,
            rebuilt: (0..u64::BITS).map(|_| OnceLock::new()).collect(),
            moving: Mutex::new(Published::first(shift)),
        })
    }

    /// The granule, as its binary logarithm.
    pub(crate) fn shift(&self) -> u32 {
        self.published().shift()
    }

    /// Marks the page that holds the guest-physical `address`; true if its granule was clean.
    #[inline]
    pub(crate) fn mark_address(&self, address: u64) -> Result<bool, OutOfRange> {
        let offset = self.offset_of(address)?;
        Ok(self.mark(|table, shift| table.mark_page(offset >> shift)))
    }

    /// Takes all marks out, into marks without any that `make` provides for the present granule.
    pub(crate) fn take<T>(
        &self,
        make: impl FnOnce(u32) -> Result<T, GeometryError>,
        marks_of: impl Fn(&T) -> &Self,
    ) -> Result<T, GeometryError> {
        let moving = self.lock();
        let shift = moving.shift();
        let taken = make(shift)?;
        let table = marks_of(&taken).table(shift);
        self.table(shift).take(|word, bits| {
            table.mark_word(word, bits);
        });
        Ok(taken)
    }

    /// Takes all marks out, run by run.
    pub(crate) fn take_runs(&self, mut each: impl FnMut(Range<u64>)) {
        let moving = self.lock();
        let shift = moving.shift();
        self.table(shift)
            .take(|word, bits| self.each_run(shift, word, bits, &mut each));
    }

    /// Forgets all marks. Nothing marks meanwhile.
    pub(crate) fn clear(&self) {
        let moving = self.lock();
        self.table(moving.shift()).clear();
    }

    /// Adds the marks of `other`, which covers the same RAM and may have any granule.
    pub(crate) fn add(&self, other: &Self) {
        for run in crate::runs::Runs::new(other) {
            self.mark_offsets(run);
        }
    }

    /// Goes over to granules of `granule` bytes; see [`DirtyBitmap::rebuild`](crate::DirtyBitmap::rebuild).
    pub(crate) fn rebuild(&self, granule: u64) -> Result<(), GeometryError> {
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
    pub(crate) fn each_run(
        &self,
        shift: u32,
        word: usize,
        mut bits: u64,
        mut each: impl FnMut(Range<u64>),
    ) {
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
            let ram = Ram::new(0, 1 << 20, 4096).unwrap();
            let bitmap = Marks::clean(ram, 12).unwrap();
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
