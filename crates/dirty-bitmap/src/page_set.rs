//! Sets of pages, for set algebra and for records of what was written.

mod spans;

use std::fmt;
use std::ops::Range;

use crate::bitmap::DirtyBitmap;
use crate::geometry::OutOfRange;
use crate::kind::Markable;
use crate::ranges::coalesce;
use spans::Spans;

/// A set of pages of a range of addresses.
///
/// Addresses are in bytes: guest-physical ones, or offsets in a memory file. The last page ends
/// where the range ends.
///
/// # Memory
/// A set uses at most one bit for each page. It allocates the bits in blocks of 4096 pages: for
/// each block that has some of its pages in the set. A run of whole blocks that was added at once
/// takes a few bytes, so a set of all pages is small for any range.
///
/// # Examples
/// The pages that two saves have in common:
/// ```
/// use dirty_bitmap::DirtyBitmap;
///
/// let (a, b) = (DirtyBitmap::new(0, 1 << 20, 4096)?, DirtyBitmap::new(0, 1 << 20, 4096)?);
/// a.mark_range(0x1000, 0x4000)?;
/// b.mark_range(0x3000, 0x4000)?;
/// let mut only_a = a.page_set();
/// only_a.subtract(&b.page_set());
/// let mut both = a.page_set();
/// both.subtract(&only_a);
/// assert!(both.runs().eq([0x3000..0x5000]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
#[must_use = "a set of pages does nothing until it is read"]
pub struct PageSet {
    range: Range<u64>,
    page_size: u64,
    /// The pages, numbered from the start of the range.
    pages: Spans,
}

impl PageSet {
    /// Creates an empty set of the addresses `range`, in pages of `page_size` bytes from the start
    /// of the range on.
    ///
    /// # Panics
    /// Panics if `page_size` is not a power of two, or if the range ends before it starts.
    pub fn new(range: Range<u64>, page_size: u64) -> Self {
        assert!(page_size.is_power_of_two(), "a page of {page_size} bytes");
        assert!(range.start <= range.end, "the range {range:?}");
        Self {
            range,
            page_size,
            pages: Spans::default(),
        }
    }

    /// Returns the range of addresses whose pages the set can contain.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Returns the page size in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Adds every page that `addresses` touch.
    ///
    /// # Panics
    /// Panics if any of the addresses is outside the range of the set.
    pub fn add(&mut self, addresses: &Range<u64>) {
        let pages = self.pages_touched(addresses);
        self.pages.add(pages);
    }

    /// Removes every page that `addresses` touch.
    ///
    /// # Panics
    /// Panics if any of the addresses is outside the range of the set.
    pub fn remove(&mut self, addresses: &Range<u64>) {
        let pages = self.pages_touched(addresses);
        self.pages.remove(pages);
    }

    /// Adds every page that a page of `other` touches. The sets may differ in page size.
    ///
    /// # Panics
    /// Panics if a page of `other` is outside the range of this set.
    pub fn union(&mut self, other: &Self) {
        other.runs().for_each(|run| self.add(&run));
    }

    /// Removes every page that a page of `other` touches. The sets may differ in page size.
    ///
    /// # Panics
    /// Panics if a page of `other` is outside the range of this set.
    pub fn subtract(&mut self, other: &Self) {
        other.runs().for_each(|run| self.remove(&run));
    }

    /// Returns whether the page that holds `address` is in the set. An address outside the range of
    /// the set is not.
    #[must_use]
    pub fn contains(&self, address: u64) -> bool {
        self.range.contains(&address)
            && self
                .pages
                .contains((address - self.range.start) / self.page_size)
    }

    /// Returns whether the set has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs().next().is_none()
    }

    /// Returns the number of pages in the set.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        let pages = self.pages.runs_in(0..self.pages_touched(&self.range).end);
        pages.map(|run| run.end - run.start).sum()
    }

    /// Returns the maximal runs of pages in the set, as ascending ranges of addresses.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs_in(self.range())
    }

    /// Returns the runs of [`runs`](Self::runs) inside `addresses`, cut off at its ends.
    ///
    /// # Panics
    /// Panics if any of the addresses is outside the range of the set.
    pub fn runs_in(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let Range { start, end } = self.range;
        let runs = self.pages.runs_in(self.pages_touched(&addresses));
        coalesce(runs).map(move |run| {
            let at = |page: u64| {
                start
                    .saturating_add(page.saturating_mul(self.page_size))
                    .min(end)
            };
            at(run.start).max(addresses.start)..at(run.end).min(addresses.end)
        })
    }

    /// Returns the maximal runs of pages that are not in the set, as ascending ranges of addresses.
    pub fn gaps(&self) -> impl Iterator<Item = Range<u64>> {
        self.gaps_in(self.range())
    }

    /// Returns the gaps of [`gaps`](Self::gaps) inside `addresses`, cut off at its ends.
    ///
    /// # Panics
    /// Panics if any of the addresses is outside the range of the set.
    pub fn gaps_in(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let Range { start: mut at, end } = addresses;
        let mut runs = self.runs_in(addresses);
        std::iter::from_fn(move || {
            while at < end {
                let run = runs.next().unwrap_or(end..end);
                let gap = at..run.start;
                at = run.end;
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// Returns the numbers of the pages that `addresses` touch.
    fn pages_touched(&self, addresses: &Range<u64>) -> Range<u64> {
        if addresses.is_empty() {
            return 0..0;
        }
        let Range { start, end } = self.range;
        assert!(
            start <= addresses.start && addresses.end <= end,
            "{addresses:?} is not inside {:?}",
            self.range
        );
        let last = (addresses.end - 1 - start) / self.page_size;
        (addresses.start - start) / self.page_size..last + 1
    }
}

impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        self.range == other.range
            && self.page_size == other.page_size
            && self.runs().eq(other.runs())
    }
}

impl Eq for PageSet {}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageSet")
            .field("range", &self.range)
            .field("page_size", &self.page_size)
            .field("page_count", &self.page_count())
            .finish()
    }
}

impl<K> DirtyBitmap<K> {
    /// Returns a copy of the marks, in pages of the current [granule](Self::granule). The bitmap
    /// keeps its marks.
    ///
    /// After [`rebuild`](DirtyBitmap::rebuild), the pages of the set are not those of
    /// [`page_size`](Self::page_size): [`dirty_pages`](Self::dirty_pages) counts those, and
    /// [`pages`](Self::pages) returns them.
    pub fn page_set(&self) -> PageSet {
        let generation = self.marks.lock();
        let shift = generation.shift();
        let start = self.ram_start();
        let mut set = PageSet::new(start..start + self.ram_size(), 1 << shift);
        let table = self.marks.table(shift);
        for word in table.marked_words(0) {
            self.marks
                .for_each_run(shift, word, table.word(word), |run| {
                    set.add(&(start + run.start..start + run.end));
                });
        }
        set
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Marks every page that a page of `set` touches. The page size of the set is independent of
    /// that of the bitmap.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] for the first run of pages that is not inside the RAM. Every page
    /// inside is marked nevertheless.
    pub fn mark_pages(&self, set: &PageSet) -> Result<(), OutOfRange> {
        let mut outside = Ok(());
        for run in set.runs() {
            let marked = self.mark_range(run.start, run.end - run.start);
            outside = outside.and(marked.map(drop));
        }
        outside
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 0x1000_0200;
    const PAGE: u64 = 512;
    const PAGES: u64 = 3 * spans::BLOCK + 100;
    /// The last page is not whole.
    const SIZE: u64 = PAGES * PAGE - 100;

    /// Returns a strategy for page runs: whole blocks, single pages and others.
    fn run() -> impl Strategy<Value = Range<u64>> {
        let block = (0..4_u64, 1..3_u64).prop_map(|(first, count)| {
            first * spans::BLOCK..PAGES.min((first + count) * spans::BLOCK)
        });
        let any =
            (0..PAGES, 1..2 * spans::BLOCK).prop_map(|(start, len)| start..PAGES.min(start + len));
        prop_oneof![block, any, (0..PAGES).prop_map(|page| page..page + 1)]
    }

    fn addresses(pages: &Range<u64>) -> Range<u64> {
        let at = |page| START + SIZE.min(page * PAGE);
        at(pages.start)..at(pages.end)
    }

    proptest! {
        #[test]
        fn a_set_matches_a_list_of_flags(
            steps in prop::collection::vec((any::<bool>(), run()), 0..12),
            asked in (0..=PAGES, 0..=PAGES),
        ) {
            let mut set = PageSet::new(START..START + SIZE, PAGE);
            let mut flags = vec![false; PAGES as usize];
            for (add, pages) in steps {
                match add {
                    true => set.add(&addresses(&pages)),
                    false => set.remove(&addresses(&pages)),
                }
                flags[pages.start as usize..pages.end as usize].fill(add);
            }
            prop_assert_eq!(set.page_count(), flags.iter().filter(|flag| **flag).count() as u64);
            prop_assert_eq!(set.is_empty(), !flags.contains(&true));
            let asked = asked.0.min(asked.1)..asked.0.max(asked.1);
            for (wanted, runs) in [
                (true, set.runs_in(addresses(&asked)).collect::<Vec<_>>()),
                (false, set.gaps_in(addresses(&asked)).collect()),
            ] {
                prop_assert!(runs.iter().all(|run| !run.is_empty()));
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
                let listed = |page: u64| {
                    let page = addresses(&(page..page + 1));
                    runs.iter().any(|run| run.start <= page.start && page.end <= run.end)
                };
                for page in asked.clone() {
                    prop_assert_eq!(listed(page), flags[page as usize] == wanted);
                }
            }
            for (page, flag) in flags.iter().enumerate().step_by(97) {
                prop_assert_eq!(set.contains(START + page as u64 * PAGE + 7), *flag);
            }
        }
    }

    #[test]
    fn a_set_of_all_pages_takes_no_memory() {
        let mut set = PageSet::new(0..1 << 62, PAGE);
        assert!(set.gaps().eq([0..1 << 62]));
        set.add(&(0..1 << 62));
        assert!(set.runs().eq([0..1 << 62]));
        set.remove(&(PAGE << 42..(PAGE << 42) + 1));
        assert!(set.gaps().eq([PAGE << 42..(PAGE << 42) + PAGE]));
        assert_eq!(set.page_count(), (1 << 62) / PAGE - 1);
    }

    #[test]
    fn sets_with_the_same_pages_are_equal() {
        let set = |runs: &[Range<u64>]| {
            let mut set = PageSet::new(0..64 << 20, 4096);
            runs.iter().for_each(|run| set.add(run));
            set
        };
        assert_eq!(set(&[0..32 << 20]), set(&[8 << 20..32 << 20, 0..8 << 20]));
        assert_ne!(set(&[0..32 << 20]), set(&[0..31 << 20]));
        assert_ne!(set(&[]), PageSet::new(0..64 << 20, 8192));
    }

    #[test]
    fn sets_of_other_page_sizes_are_widened() {
        let mut coarse = PageSet::new(0..1 << 20, 16384);
        let mut fine = PageSet::new(0..1 << 20, 4096);
        fine.add(&(20000..20001));
        fine.add(&(60000..60001));
        coarse.union(&fine);
        assert!(coarse.runs().eq([16384..32768, 49152..65536]));
        fine.remove(&(20000..20001));
        coarse.subtract(&fine);
        assert!(coarse.runs().eq([16384..32768]));
    }

    #[test]
    #[should_panic(expected = "is not inside")]
    fn an_address_outside_the_range_is_refused() {
        PageSet::new(4096..8192, 4096).add(&(8191..8193));
    }
}
