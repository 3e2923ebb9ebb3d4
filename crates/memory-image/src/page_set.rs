//! Sets of pages of one image: a bit a page, whatever the number of runs.

use std::ops::Range;

use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageSet {
    bits: BitVec<u64, Lsb0>,
    page_size: u64,
}

impl PageSet {
    /// No page of an image of `size` bytes, a multiple of `page_size`. `None` where memory has no room for so many bits: whoever
    /// made the file chose its length, and an allocation that fails would end the process.
    pub(crate) fn empty(size: u64, page_size: u64) -> Option<Self> {
        let pages = usize::try_from(size / page_size).ok()?;
        let len = pages.div_ceil(u64::BITS as usize);
        let mut words = Vec::new();
        words.try_reserve_exact(len).ok()?;
        words.resize(len, 0);
        let mut bits = BitVec::try_from_vec(words).ok()?;
        bits.truncate(pages);
        Some(Self { bits, page_size })
    }

    /// Adds the pages that `bytes`, inside the image, touch.
    pub(crate) fn add(&mut self, bytes: &Range<u64>) {
        if !bytes.is_empty() {
            let pages = bytes.start / self.page_size..bytes.end.div_ceil(self.page_size);
            self.bits[pages.start as usize..pages.end as usize].fill(true);
        }
    }

    /// Takes away the pages that `bytes`, of whole pages inside the image, are.
    pub(crate) fn clear(&mut self, bytes: &Range<u64>) {
        let pages = bytes.start / self.page_size..bytes.end / self.page_size;
        self.bits[pages.start as usize..pages.end as usize].fill(false);
    }

    /// Takes away every page of `other`, a set of an image of the same size.
    pub(crate) fn remove(&mut self, other: &Self) {
        for (mine, theirs) in self
            .bits
            .as_raw_mut_slice()
            .iter_mut()
            .zip(other.bits.as_raw_slice())
        {
            *mine &= !theirs;
        }
    }

    /// Adds every page of `other`, a set of an image of the same size.
    pub(crate) fn unite(&mut self, other: &Self) {
        self.bits |= &other.bits;
    }

    pub(crate) fn contains(&self, offset: u64) -> bool {
        self.bits[(offset / self.page_size) as usize]
    }

    /// The runs of pages in the set, ascending, in bytes.
    pub(crate) fn into_runs(self) -> impl Iterator<Item = Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.run_from(from..self.bits.len())?;
            from = run.end;
            Some(self.bytes(&run))
        })
    }

    /// The parts of `within`, bytes of the image, that are in pages of the set: ascending, each as long as it can be.
    pub(crate) fn runs_in(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let page = self.page_size;
        let mut left = (within.start / page) as usize..within.end.div_ceil(page) as usize;
        std::iter::from_fn(move || {
            let run = self.run_from(left.clone())?;
            left.start = run.end;
            let bytes = self.bytes(&run);
            Some(bytes.start.max(within.start)..bytes.end.min(within.end))
        })
    }

    fn run_from(&self, pages: Range<usize>) -> Option<Range<usize>> {
        let bits = &self.bits[pages.clone()];
        let start = bits.first_one()?;
        let end = start + bits[start..].leading_ones();
        Some(pages.start + start..pages.start + end)
    }

    fn bytes(&self, pages: &Range<usize>) -> Range<u64> {
        pages.start as u64 * self.page_size..pages.end as u64 * self.page_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_pages_are_added_taken_away_and_listed_as_runs() {
        let mut set = PageSet::empty(200 * 4096, 4096).unwrap();
        assert_eq!(set.clone().into_runs().count(), 0);
        set.add(&(5000..5000));
        set.add(&(4095..4097));
        set.add(&(60 * 4096..70 * 4096));
        set.add(&(199 * 4096..200 * 4096));
        assert_eq!(
            set.clone().into_runs().collect::<Vec<_>>(),
            [0..8192, 60 * 4096..70 * 4096, 199 * 4096..200 * 4096]
        );

        let mut other = PageSet::empty(200 * 4096, 4096).unwrap();
        other.add(&(62 * 4096..66 * 4096));
        other.add(&(0..4096));
        set.remove(&other);
        assert_eq!(
            set.clone().into_runs().take(3).collect::<Vec<_>>(),
            [4096..8192, 60 * 4096..62 * 4096, 66 * 4096..70 * 4096]
        );
        assert!(set.contains(8191) && !set.contains(8192) && !set.contains(0));
        set.unite(&other);
        assert_eq!(
            set.clone().into_runs().take(2).collect::<Vec<_>>(),
            [0..8192, 60 * 4096..70 * 4096]
        );
    }
}
