//! Sets of pages of the memory file: bitmaps in blocks that are allocated on demand.

use std::collections::BTreeMap;
use std::ops::Range;

use bitvec::BitArr;
use bitvec::array::BitArray;

/// Pages per block.
const BLOCK: u64 = 4096;

type Block = BitArr!(for BLOCK as usize, in u64);

/// A set of pages of a memory file. Uses a bit per page in each block of 4096 pages that contains a
/// page of the set.
#[derive(Debug)]
pub(crate) struct PageSet {
    blocks: BTreeMap<u64, Box<Block>>,
    page_size: u64,
    /// The total number of pages.
    pages: u64,
}

impl PageSet {
    /// Creates an empty set for a file of `size` bytes, which is a multiple of `page_size`.
    pub(crate) fn new(size: u64, page_size: u64) -> Self {
        Self {
            blocks: BTreeMap::new(),
            page_size,
            pages: size / page_size,
        }
    }

    /// Adds a run of bytes that consists of whole pages.
    pub(crate) fn add(&mut self, run: &Range<u64>) {
        let (mut page, end) = (run.start / self.page_size, run.end / self.page_size);
        while page < end {
            let (block, within) = in_block(page..end);
            let bits = self.blocks.entry(block);
            let bits = bits.or_insert_with(|| Box::new(BitArray::ZERO));
            page += within.len() as u64;
            bits[within].fill(true);
        }
    }

    /// Returns the offset of the first page in a run of whole pages that is in the set.
    pub(crate) fn first_in(&self, run: &Range<u64>) -> Option<u64> {
        let (start, end) = (run.start / self.page_size, run.end / self.page_size);
        let blocks = self.blocks.range(start / BLOCK..end.div_ceil(BLOCK));
        let found = blocks.into_iter().find_map(|(block, bits)| {
            let first = block * BLOCK;
            let (_, within) = in_block(start.max(first)..end.max(first));
            let at = bits.get(within.clone())?.first_one()?;
            Some(first + (within.start + at) as u64)
        });
        found.map(|page| page * self.page_size)
    }

    /// Returns the offset of the first page in a run of whole pages that is not in the set.
    pub(crate) fn first_missing(&self, run: &Range<u64>) -> Option<u64> {
        let (mut page, end) = (run.start / self.page_size, run.end / self.page_size);
        while page < end {
            let (block, within) = in_block(page..end);
            let missing = match self.blocks.get(&block) {
                Some(bits) => bits[within.clone()].first_zero(),
                None => Some(0),
            };
            if let Some(missing) = missing {
                return Some((page + missing as u64) * self.page_size);
            }
            page += within.len() as u64;
        }
        None
    }

    /// Returns the size of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.pages * self.page_size
    }

    /// Returns the maximal runs of bytes that are not in the set, in ascending order.
    pub(crate) fn missing(&self) -> impl Iterator<Item = Range<u64>> {
        let size = self.size();
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.first_missing(&(from..size))?;
            from = self.first_in(&(start..size)).unwrap_or(size);
            Some(start..from)
        })
    }
}

/// Returns the block of the first of these pages, and the pages' range inside the block.
fn in_block(pages: Range<u64>) -> (u64, Range<usize>) {
    let (block, start) = (pages.start / BLOCK, pages.start % BLOCK);
    let end = BLOCK.min(start + (pages.end - pages.start));
    (block, start as usize..end as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 512;
    const PAGES: u64 = 3 * BLOCK + 100;

    proptest! {
        #[test]
        fn queries_match_a_list_of_flags(
            added in prop::collection::vec((0..PAGES, 1..2 * BLOCK), 0..6),
            asked in (0..=PAGES, 0..=PAGES),
        ) {
            let mut set = PageSet::new(PAGES * PAGE, PAGE);
            let mut flags = vec![false; PAGES as usize];
            for (start, len) in added {
                let end = PAGES.min(start + len);
                set.add(&(start * PAGE..end * PAGE));
                flags[start as usize..end as usize].fill(true);
            }
            let (start, end) = (asked.0.min(asked.1), asked.0.max(asked.1));
            let first = |wanted| (start..end).find(|page| flags[*page as usize] == wanted);
            let run = start * PAGE..end * PAGE;
            prop_assert_eq!(set.first_in(&run), first(true).map(|page| page * PAGE));
            prop_assert_eq!(set.first_missing(&run), first(false).map(|page| page * PAGE));
            let mut left = vec![true; PAGES as usize];
            let mut last = None;
            for run in set.missing() {
                prop_assert!(!run.is_empty() && last.is_none_or(|last| last < run.start));
                last = Some(run.end);
                left[(run.start / PAGE) as usize..(run.end / PAGE) as usize].fill(false);
            }
            prop_assert_eq!(left, flags);
        }
    }

    #[test]
    fn memory_use_does_not_depend_on_the_file_size() {
        let mut set = PageSet::new(1 << 52, PAGE);
        assert_eq!(set.missing().collect::<Vec<_>>(), [0..1 << 52]);
        set.add(&(PAGE << 42..(PAGE << 42) + PAGE));
        assert_eq!(set.blocks.len(), 1);
        assert_eq!(set.missing().count(), 2);
    }
}
