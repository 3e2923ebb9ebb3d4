//! The set of pages that are no longer filled from the images: a bit for each page, set by several
//! threads.

use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use zerocopy::FromZeros;

const BITS: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(crate) struct PageBits {
    words: Box<[AtomicU64]>,
    page: u64,
}

impl PageBits {
    /// Returns an empty set for `len` bytes, whole pages. The host allocates memory for the bits
    /// when they are set, so that RAM that an image merely claims takes none.
    ///
    /// # Errors
    /// Fails if there is no address space for the bits.
    pub(crate) fn none(len: u64, page: u64) -> io::Result<Self> {
        let words = usize::try_from((len / page).div_ceil(BITS)).ok();
        let words = words.and_then(|words| <[AtomicU64]>::new_box_zeroed_with_elems(words).ok());
        let words = words.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { words, page })
    }

    /// Returns the size of a page in bytes.
    pub(crate) fn page_size(&self) -> u64 {
        self.page
    }

    /// Adds a range of whole pages, after they were filled, poisoned or discarded. Returns the
    /// number of bytes that were not in the set before.
    pub(crate) fn add(&self, bytes: Range<u64>) -> u64 {
        let (mut at, end) = (bytes.start / self.page, bytes.end / self.page);
        let mut new = 0;
        while at < end {
            let next = end.min((at / BITS + 1) * BITS);
            let mask = u64::MAX >> (BITS - (next - at)) << (at % BITS);
            // Release: a thread that finds the bit set finds the page filled.
            let before = self.words[(at / BITS) as usize].fetch_or(mask, Release);
            new += (mask & !before).count_ones();
            at = next;
        }
        u64::from(new) * self.page
    }

    pub(crate) fn contains(&self, offset: u64) -> bool {
        let page = offset / self.page;
        self.words[(page / BITS) as usize].load(Acquire) >> (page % BITS) & 1 == 1
    }

    /// Returns the first run in a range of whole pages that is not in the set.
    pub(crate) fn first_missing(&self, bytes: Range<u64>) -> Option<Range<u64>> {
        let (from, end) = (bytes.start / self.page, bytes.end / self.page);
        let start = self.find(from, end, 0);
        let stop = self.find(start, end, u64::MAX);
        (start < stop).then(|| start * self.page..stop * self.page)
    }

    /// Returns the first page from `at` on whose bit equals the bits of `wanted`, or else `end`.
    fn find(&self, mut at: u64, end: u64, wanted: u64) -> u64 {
        while at < end {
            let word = self.words[(at / BITS) as usize].load(Acquire);
            let found = !(word ^ wanted) >> (at % BITS);
            if found != 0 {
                return end.min(at + u64::from(found.trailing_zeros()));
            }
            at = (at / BITS + 1) * BITS;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 200;

    proptest! {
        #[test]
        fn missing_runs_are_the_pages_not_added(
            added in prop::collection::vec((0..PAGES, 0..100_u64), 0..10),
            asked in (0..PAGES, 0..=PAGES),
        ) {
            let present = PageBits::none(PAGES * PAGE, PAGE).unwrap();
            let mut oracle = vec![false; PAGES as usize];
            for (start, len) in added {
                let end = PAGES.min(start + len);
                let pages = &mut oracle[start as usize..end as usize];
                let new = pages.iter().filter(|page| !**page).count() as u64;
                pages.fill(true);
                prop_assert_eq!(present.add(start * PAGE..end * PAGE), new * PAGE);
            }
            for page in 0..PAGES {
                prop_assert_eq!(present.contains(page * PAGE + 17), oracle[page as usize]);
            }
            let (start, end) = (asked.0, asked.0.max(asked.1));
            let first = (start..end).find(|page| !oracle[*page as usize]);
            let expected = first.map(|first| {
                let stop = (first..end).find(|page| oracle[*page as usize]);
                first * PAGE..stop.unwrap_or(end) * PAGE
            });
            prop_assert_eq!(present.first_missing(start * PAGE..end * PAGE), expected);
        }
    }

    #[test]
    fn words_are_as_many_as_the_pages_need() {
        for (pages, words) in [(1, 1), (64, 1), (65, 2), (1 << 20, 1 << 14)] {
            let set = PageBits::none(pages * PAGE, PAGE).unwrap();
            assert_eq!(set.words.len(), words, "{pages} pages");
        }
    }
}
