//! The tables of a bitmap, which many threads mark, and one thread at a time drains or rebuilds.

use std::ops::Range;
use std::sync::{OnceLock, PoisonError};

use crate::geometry::{GeometryError, OutOfRange, RamRange};
use crate::ranges::runs_of_word;
use crate::runs::Runs;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::table::Table;

/// The marks of a range of RAM, with one table for each granule used so far.
pub(crate) struct Marks {
    pub(crate) ram: RamRange,
    pub(crate) page_shift: u32,
    /// The [`TableGeneration`] of the table that marks go to.
    current: AtomicU64,
    /// The table of the first granule, which is that of the pages unless the bitmap was decoded. It
    /// takes one indirection less than the tables of other granules.
    first: Table,
    first_shift: u32,
    /// The other tables, by the binary logarithm of their granule. Each is allocated once and never
    /// freed, because a marker may hold it.
    rebuilt: Box<[OnceLock<Table>]>,
    /// The value of `current`, locked by each operation that moves or reads marks. The lock keeps
    /// such an operation from missing a mark that is being moved between tables.
    migration: Mutex<TableGeneration>,
}

/// The table that marks go to, and the number of changes so far, in one word.
///
/// The low byte is the binary logarithm of the table's granule. The bits above count the changes,
/// so that a marker detects a change even if the bitmap has returned to the granule that the marker
/// saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableGeneration(u64);

impl TableGeneration {
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
    /// Creates a clean set of marks in pages of `1 << shift` bytes.
    pub(crate) fn clean(ram: RamRange, shift: u32) -> Result<Self, GeometryError> {
        Self::clean_in_granules(ram, shift, shift)
    }

    /// Creates a clean set of marks in pages of `1 << page_shift` bytes, as after a
    /// [`rebuild`](Self::rebuild) for granules of `1 << shift` bytes. Memory is allocated only for
    /// the granules.
    pub(crate) fn clean_in_granules(
        ram: RamRange,
        page_shift: u32,
        shift: u32,
    ) -> Result<Self, GeometryError> {
        Ok(Self {
            ram,
            page_shift,
            current: AtomicU64::new(TableGeneration::first(shift).0),
            first: Table::new(ram.pages(shift))?,
            first_shift: shift,
            rebuilt: (0..u64::BITS).map(|_| OnceLock::new()).collect(),
            migration: Mutex::new(TableGeneration::first(shift)),
        })
    }

    /// Returns the binary logarithm of the granule.
    pub(crate) fn shift(&self) -> u32 {
        self.generation().shift()
    }

    /// Marks the page that holds the guest-physical `address`. Returns whether its granule was
    /// clean.
    #[inline]
    pub(crate) fn mark_address(&self, address: u64) -> Result<bool, OutOfRange> {
        let offset = self.offset_of(address)?;
        Ok(self.mark(|table, shift| table.mark_page(offset >> shift)))
    }

    /// Moves all marks to a clean set of marks, which `make` provides for the current granule.
    pub(crate) fn take<T>(
        &self,
        make: impl FnOnce(u32) -> Result<T, GeometryError>,
        marks_of: impl Fn(&T) -> &Self,
    ) -> Result<T, GeometryError> {
        let generation = self.lock();
        let shift = generation.shift();
        let taken = make(shift)?;
        let table = marks_of(&taken).table(shift);
        self.table(shift).take(|word, bits| {
            table.mark_word(word, bits);
        });
        Ok(taken)
    }

    /// Takes all marks, and calls `each` with every run.
    pub(crate) fn take_runs(&self, mut each: impl FnMut(Range<u64>)) {
        let generation = self.lock();
        let shift = generation.shift();
        self.table(shift)
            .take(|word, bits| self.for_each_run(shift, word, bits, &mut each));
    }

    /// Clears all marks. No thread may mark concurrently.
    pub(crate) fn clear(&self) {
        let generation = self.lock();
        self.table(generation.shift()).clear();
    }

    /// Adds the marks of `other`, which covers the same RAM and may have any granule.
    pub(crate) fn add(&self, other: &Self) {
        for run in Runs::new(other) {
            self.mark_offsets(run);
        }
    }

    /// Changes the granule to `granule` bytes: see
    /// [`DirtyBitmap::rebuild`](crate::DirtyBitmap::rebuild).
    pub(crate) fn rebuild(&self, granule: u64) -> Result<(), GeometryError> {
        let to = self.ram.shift_of(granule)?;
        let mut generation = self.lock();
        let from = generation.shift();
        if from == to {
            return Ok(());
        }
        let table = self.table_or_new(to)?;
        // Discard marks that missed an earlier rebuild of this table. Their markers saw the change
        // and marked the new table as well.
        table.take(|_, _| ());
        // Publish before sweeping the old table: a marker that misses the sweep finds the new table
        // when it checks again.
        *generation = generation.next(to);
        self.current.store(generation.0, Ordering::Release);
        self.table(from).take(|word, bits| {
            self.for_each_run(from, word, bits, |run| {
                _ = table.mark(pages_touched(&run, to))
            });
        });
        Ok(())
    }

    /// Returns the offset of a guest-physical address from the start of the RAM.
    #[inline]
    pub(crate) fn offset_of(&self, address: u64) -> Result<u64, OutOfRange> {
        // An address below the start wraps to an offset past the end.
        let offset = address.wrapping_sub(self.ram.start);
        if offset >= self.ram.size {
            return Err(self.ram.out_of_range(address, address.saturating_add(1)));
        }
        Ok(offset)
    }

    /// Marks the granules that `offsets` touches. Returns whether any of them was clean.
    ///
    /// `offsets` is not empty and lies inside the RAM.
    pub(crate) fn mark_offsets(&self, offsets: Range<u64>) -> bool {
        self.mark(|table, shift| table.mark(pages_touched(&offsets, shift)))
    }

    /// Calls `set` with the current table and its shift, until the table is unchanged afterwards.
    /// Returns whether any call returned true.
    #[inline]
    fn mark(&self, set: impl Fn(&Table, u32) -> bool) -> bool {
        let generation = self.generation();
        let was_clean = set(self.table(generation.shift()), generation.shift());
        // After a rebuild in between, the mark may have missed the sweep of its table.
        let now = self.generation();
        if now == generation {
            return was_clean;
        }
        self.mark_again(now, set) | was_clean
    }

    /// Repeats [`mark`](Self::mark) after the table changed.
    #[cold]
    fn mark_again(
        &self,
        mut generation: TableGeneration,
        set: impl Fn(&Table, u32) -> bool,
    ) -> bool {
        let mut was_clean = false;
        loop {
            was_clean |= set(self.table(generation.shift()), generation.shift());
            let now = self.generation();
            if now == generation {
                return was_clean;
            }
            generation = now;
        }
    }

    /// Calls `each` with the byte offsets of every run of marks in a word.
    pub(crate) fn for_each_run(
        &self,
        shift: u32,
        word: usize,
        bits: u64,
        mut each: impl FnMut(Range<u64>),
    ) {
        let base = word as u64 * u64::from(u64::BITS);
        for run in runs_of_word(bits) {
            each(self.offsets_of(base + run.start..base + run.end, shift));
        }
    }

    /// Returns the byte offsets of `pages`, cut off at the end of the RAM.
    pub(crate) fn offsets_of(&self, pages: Range<u64>, shift: u32) -> Range<u64> {
        pages.start << shift..(pages.end << shift).min(self.ram.size)
    }

    /// Prevents marks from being moved. While the lock is held, all marks are in one table.
    pub(crate) fn lock(&self) -> MutexGuard<'_, TableGeneration> {
        // A panic leaves nothing inconsistent: an interrupted move leaves the other marks where
        // they were.
        self.migration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(crate) fn table(&self, shift: u32) -> &Table {
        if shift == self.first_shift {
            return &self.first;
        }
        self.rebuilt[shift as usize]
            .get()
            .expect("a table is allocated before it is published")
    }

    fn table_or_new(&self, shift: u32) -> Result<&Table, GeometryError> {
        let slot = &self.rebuilt[shift as usize];
        if shift != self.first_shift && slot.get().is_none() {
            let table = Table::new(self.ram.pages(shift))?;
            // Only the holder of the lock allocates tables.
            let set = slot.set(table);
            debug_assert!(set.is_ok());
        }
        Ok(self.table(shift))
    }

    #[inline]
    fn generation(&self) -> TableGeneration {
        TableGeneration(self.current.load(Ordering::Acquire))
    }
}

/// Returns the indexes of the pages of `1 << shift` bytes that `offsets` touches. `offsets` is not
/// empty.
pub(crate) fn pages_touched(offsets: &Range<u64>, shift: u32) -> Range<u64> {
    offsets.start >> shift..((offsets.end - 1) >> shift) + 1
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn every_generation_of_a_table_is_distinct() {
        let mut seen = vec![TableGeneration::first(12)];
        for shift in [14, 12].repeat(10) {
            let next = seen[seen.len() - 1].next(shift);
            assert_eq!(next.shift(), shift);
            assert!(!seen.contains(&next), "{next:?}");
            seen.push(next);
        }
    }

    #[test]
    fn a_page_is_clean_if_any_table_reports_it_during_a_rebuild() {
        for tables in 0..8_u32 {
            let ram = RamRange::new(0, 1 << 20, 4096).unwrap();
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
