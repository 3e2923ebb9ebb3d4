//! Reads marks by page number, in the units of [`DirtyBitmap::mark_page`].

use std::ops::Range;

use crate::bitmap::DirtyBitmap;
use crate::marks::pages_touched;
use crate::ranges::coalesce;

const WORD_BITS: u64 = u64::BITS as u64;

impl<K> DirtyBitmap<K> {
    /// Returns the maximal runs of marked pages in ascending order, as ranges of page indexes.
    ///
    /// The index counts pages of [`page_size`](Self::page_size) from the start of the RAM, as in
    /// [`mark_page`](Self::mark_page). It does not depend on the granule. A page with a mark on any
    /// part of it is marked. While threads mark, the same applies as to [`runs`](Self::runs).
    ///
    /// # Examples
    /// ```
    /// let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 4096)?;
    /// bitmap.mark_page(5)?;
    /// bitmap.rebuild(16384)?; // one mark now stands for four pages
    /// assert!(bitmap.pages().flatten().eq([4, 5, 6, 7]));
    /// assert_eq!(bitmap.dirty_pages(), 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pages(&self) -> impl Iterator<Item = Range<u64>> {
        let shift = self.marks.page_shift;
        // Two runs of a finer granule may be in one page.
        coalesce(self.runs().map(move |run| pages_touched(&run, shift)))
    }

    /// Returns the number of marked pages of [`page_size`](Self::page_size), for any granule.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.pages().map(|run| run.end - run.start).sum()
    }

    /// Returns one bit for each page of the RAM, which is set if the page is marked.
    ///
    /// Bit `i` of word `w` stands for the page of [`page_size`](Self::page_size) with the index
    /// `64 * w + i`. The other bits of the last word are clear.
    /// [`mark_words`](Self::mark_words) is the reverse.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        let pages = self.marks.ram.pages(self.marks.page_shift);
        let mut words = vec![0; pages.div_ceil(WORD_BITS) as usize];
        for run in self.pages() {
            let mut page = run.start;
            while page < run.end {
                let (word, bit) = (page / WORD_BITS, page % WORD_BITS);
                let count = (run.end - page).min(WORD_BITS - bit);
                words[word as usize] |= u64::MAX >> (WORD_BITS - count) << bit;
                page += count;
            }
        }
        words
    }
}
