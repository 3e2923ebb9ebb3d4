//! The state of each page in a capture.

use std::ops::Range;

use crate::sync::{AtomicU64, Ordering};

/// The state of a page in a capture.
///
/// ```text
///            fault: copy to the pool
/// Pending ──► Copying ──► Pooled
///    │           │           │ sweep: copy to the file
///    └──► Copying┴──────► Free ◄┘
///  sweep: copy to the file
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// The image does not need the page in memory: it was copied, or is not part of the image.
    Free,
    /// The page in memory has the bytes of the image, and is write-protected.
    Pending,
    /// A thread copies the page, which stays write-protected.
    Copying,
    /// The bytes of the image are in the pool.
    Pooled,
}

impl PageState {
    const fn bits(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Pending => 1,
            Self::Copying => 2,
            Self::Pooled => 3,
        }
    }

    fn from_bits(bits: u64) -> Self {
        match bits & MASK {
            0 => Self::Free,
            1 => Self::Pending,
            2 => Self::Copying,
            _ => Self::Pooled,
        }
    }
}

/// The number of pages whose states are in one word.
const PER_WORD: u64 = 32;

/// The bits of one page.
const MASK: u64 = 3;

/// A word whose pages are all [`Pending`](PageState::Pending).
const ALL_PENDING: u64 = 0x5555_5555_5555_5555;

/// The states of all pages of the RAM: 2 bits a page.
#[derive(Debug)]
pub(crate) struct PageStates {
    words: Box<[AtomicU64]>,
}

impl PageStates {
    /// Creates the states of `pages` pages, all [`Free`](PageState::Free).
    pub(crate) fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(PER_WORD)).map(|_| AtomicU64::new(0));
        Self {
            words: words.collect(),
        }
    }

    fn word(&self, page: u64) -> (&AtomicU64, u32) {
        let bit = (page % PER_WORD) as u32 * 2;
        (&self.words[(page / PER_WORD) as usize], bit)
    }

    /// Returns the state of a page.
    pub(crate) fn get(&self, page: u64) -> PageState {
        let (word, bit) = self.word(page);
        PageState::from_bits(word.load(Ordering::Acquire) >> bit)
    }

    /// Changes the state of a page from `from` to `to`, or returns its state if it is another one.
    pub(crate) fn change(
        &self,
        page: u64,
        from: PageState,
        to: PageState,
    ) -> Result<(), PageState> {
        let (word, bit) = self.word(page);
        let mut old = word.load(Ordering::Acquire);
        loop {
            let state = PageState::from_bits(old >> bit);
            if state != from {
                return Err(state);
            }
            let new = old & !(MASK << bit) | to.bits() << bit;
            match word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                // A neighbor has changed.
                Err(current) => old = current,
            }
        }
    }

    /// Ends a copy: changes the state of a page that the calling thread has set to
    /// [`Copying`](PageState::Copying).
    pub(crate) fn end_copy(&self, page: u64, to: PageState) {
        let ended = self.change(page, PageState::Copying, to);
        debug_assert_eq!(ended, Ok(()), "page {page}");
    }

    /// Makes pages [`Pending`](PageState::Pending). No other thread changes states meanwhile.
    pub(crate) fn set_pending(&self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let (word, bit) = self.word(page);
            if bit == 0 && pages.end - page >= PER_WORD {
                word.store(ALL_PENDING, Ordering::Release);
                page += PER_WORD;
                continue;
            }
            let old = word.load(Ordering::Acquire) & !(MASK << bit);
            word.store(old | PageState::Pending.bits() << bit, Ordering::Release);
            page += 1;
        }
    }

    /// Returns the runs of `pages` whose state is not [`Free`](PageState::Free).
    pub(crate) fn needed(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut next = pages.start;
        let is_free = |page| self.get(page) == PageState::Free;
        std::iter::from_fn(move || {
            let start = (next..pages.end).find(|page| !is_free(*page))?;
            let end = (start..pages.end).find(|page| is_free(*page));
            next = end.unwrap_or(pages.end);
            Some(start..next)
        })
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn states_of_neighbors_are_independent() {
        let states = PageStates::new(100);
        states.set_pending(3..97);
        assert_eq!(states.get(2), PageState::Free);
        assert_eq!(states.get(97), PageState::Free);
        assert_eq!(states.needed(0..100).collect::<Vec<_>>(), [3..97]);
        for page in 3..97 {
            let changed = states.change(page, PageState::Pending, PageState::Copying);
            assert_eq!(changed, Ok(()));
            let again = states.change(page, PageState::Pending, PageState::Copying);
            assert_eq!(again, Err(PageState::Copying));
            states.end_copy(
                page,
                [PageState::Free, PageState::Pooled][page as usize % 2],
            );
        }
        for page in 3..97 {
            let expected = [PageState::Free, PageState::Pooled][page as usize % 2];
            assert_eq!(states.get(page), expected);
        }
        assert_eq!(states.needed(0..100).count(), 47);
    }

    #[test]
    fn runs_of_any_place_and_length_become_pending() {
        for start in [0, 1, 31, 32, 33, 64] {
            for end in [start, start + 1, 32, 63, 64, 65, 96, 128] {
                let states = PageStates::new(128);
                states.set_pending(start..end);
                let expected = |page| (start..end).contains(&page);
                for page in 0..128 {
                    let is_pending = states.get(page) == PageState::Pending;
                    assert_eq!(is_pending, expected(page), "{start}..{end}: {page}");
                }
                let runs: Vec<_> = states.needed(0..128).collect();
                let expected: Vec<_> = (start < end).then_some(start..end).into_iter().collect();
                assert_eq!(runs, expected);
            }
        }
    }

    #[test]
    fn pending_again_replaces_every_state() {
        let states = PageStates::new(64);
        states.set_pending(0..64);
        for page in 0..64 {
            let to = [PageState::Free, PageState::Copying, PageState::Pooled][page as usize % 3];
            states.change(page, PageState::Pending, to).unwrap();
        }
        states.set_pending(1..40);
        assert_eq!(states.get(0), PageState::Free);
        assert!((1..40).all(|page| states.get(page) == PageState::Pending));
        assert_eq!(states.get(40), PageState::Copying);
        assert_eq!(states.needed(38..44).collect::<Vec<_>>(), [38..42, 43..44]);
    }
}
