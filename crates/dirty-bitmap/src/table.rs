//! The bits of one page size, in two levels: a word has 64 pages, a summary word says which of 64 words have any.
//!
//! # Why no mark is lost
//! A marker sets the page's bit and *then* makes sure of the summary's. A sweeper takes the summary word and *then* the words it
//! names. Both touch the same words by read-modify-write, which orders them: either the sweeper's exchange finds the
//! mark, or the marker's later operation reads from the sweeper's exchange and, acquiring it, sees everything that the
//! sweeper did before: a summary bit that is gone again, and a newly published table.
//!
//! The marker never skips its read-modify-write on a word that shows the bit already set. A plain load may be served while
//! the marker's own write to the page still sits in a store buffer: a drain in between would take the bit and copy the old page.
//! (`tests/loom.rs` has that execution.)

use std::ops::{ControlFlow, Range};

use crate::geometry::GeometryError;
use crate::sync::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(crate) struct Table {
    pages: u64,
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

impl Table {
    pub(crate) fn new(pages: u64) -> Result<Self, GeometryError> {
        let words = pages.div_ceil(WORD_BITS);
        Ok(Self {
            pages,
            words: defaults(words)?,
            summary: defaults(words.div_ceil(WORD_BITS))?,
        })
    }

    /// Marks one page; true if it was clean.
    #[inline]
    pub(crate) fn mark_page(&self, page: u64) -> bool {
        debug_assert!(page < self.pages);
        self.mark_word(index(page / WORD_BITS), 1 << (page % WORD_BITS))
    }

    /// Marks the pages of `range`; true if any of them was clean.
    pub(crate) fn mark(&self, range: Range<u64>) -> bool {
        debug_assert!(range.end <= self.pages);
        let mut was_clean = false;
        let mut page = range.start;
        while page < range.end {
            let word = page / WORD_BITS;
            let end = range.end.min((word + 1) * WORD_BITS);
            was_clean |= self.mark_word(index(word), bits(page % WORD_BITS, end - page));
            page = end;
        }
        was_clean
    }

    /// Marks the pages `bits` of a word; true if any of them was clean.
    #[inline]
    pub(crate) fn mark_word(&self, word: usize, bits: u64) -> bool {
        let before = self.words[word].fetch_or(bits, Ordering::AcqRel);
        let (summary, bit) = (&self.summary[word / 64], 1 << (word % 64));
        if summary.load(Ordering::Acquire) & bit == 0 {
            summary.fetch_or(bit, Ordering::AcqRel);
        }
        before & bits != bits
    }

    /// Takes every mark out, word by word: index of the word, its bits.
    pub(crate) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (s, summary) in self.summary.iter().enumerate() {
            // An exchange, also of a word that looks empty: it is what a concurrent marker synchronises with.
            let mut named = summary.swap(0, Ordering::AcqRel);
            while named != 0 {
                let word = s * 64 + named.trailing_zeros() as usize;
                named &= named - 1;
                let taken = self.words[word].swap(0, Ordering::AcqRel);
                if taken != 0 {
                    each(word, taken);
                }
            }
        }
    }

    /// The bits of one word.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// Whether a page is marked.
    pub(crate) fn is_marked(&self, page: u64) -> bool {
        self.word(index(page / WORD_BITS)) >> (page % WORD_BITS) & 1 == 1
    }

    /// The words that may have a mark.
    pub(crate) fn marked_words(&self) -> impl Iterator<Item = usize> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let word = self.next_named(next)?;
            next = word + 1;
            Some(word)
        })
    }

    /// Calls `each` with the runs of marked pages from page `from` on, ascending, as long as it says so.
    pub(crate) fn runs(&self, from: u64, mut each: impl FnMut(Range<u64>) -> ControlFlow<()>) {
        let mut first = index(from / WORD_BITS);
        let mut mask = u64::MAX << (from % WORD_BITS);
        // Words that are looked at next, of which the first only where `mask` says.
        while let Some(at) = self.next_named(first) {
            if at != first {
                mask = u64::MAX;
            }
            let mut named = self.named(at / 64) & (u64::MAX << (at % 64));
            let base = at / 64 * 64;
            first = base + 64;
            while named != 0 {
                let mut at = base + named.trailing_zeros() as usize;
                named &= named - 1;
                // A summary bit may outlive its word's marks, never the other way round.
                let mut bits = self.word(at) & mask;
                mask = u64::MAX;
                while bits != 0 {
                    let start = page(at, bits.trailing_zeros());
                    // The lowest mark added: it carries through the whole run.
                    let (sum, mut carry) = bits.overflowing_add(bits & bits.wrapping_neg());
                    let mut after = sum & bits;
                    while carry && at + 1 < self.words.len() {
                        at += 1;
                        bits = self.word(at);
                        (after, carry) = bits.overflowing_add(1);
                        after &= bits;
                        // What of this word follows the run is looked at now, and not again.
                        if at < base + 64 {
                            named &= !(1 << (at % 64));
                        } else {
                            named = 0;
                            first = at + 1;
                        }
                    }
                    let end = match carry {
                        true => self.pages,
                        false => page(at, u64::BITS - (bits ^ after).leading_zeros()),
                    };
                    bits = after;
                    if each(start..end).is_break() {
                        return;
                    }
                }
            }
        }
    }

    /// Whether no page is marked.
    pub(crate) fn is_clean(&self) -> bool {
        !self.marked_words().any(|word| self.word(word) != 0)
    }

    /// The first word from `from` on that the summary names.
    fn next_named(&self, from: usize) -> Option<usize> {
        let mut s = from / 64;
        if s >= self.summary.len() {
            return None;
        }
        let mut named = self.named(s) & (u64::MAX << (from % 64));
        while named == 0 {
            s += 1;
            named = self.summary.get(s)?.load(Ordering::Acquire);
        }
        Some(s * 64 + named.trailing_zeros() as usize)
    }

    /// Which of 64 words may have a mark.
    fn named(&self, s: usize) -> u64 {
        self.summary[s].load(Ordering::Acquire)
    }
}

/// `count` defaults, or why there is no memory for them.
pub(crate) fn defaults<T: Default>(count: u64) -> Result<Box<[T]>, GeometryError> {
    let failed = || GeometryError::OutOfMemory {
        bytes: count.saturating_mul(size_of::<T>() as u64),
    };
    let len = usize::try_from(count).map_err(|_| failed())?;
    let mut all = Vec::new();
    all.try_reserve_exact(len).map_err(|_| failed())?;
    all.resize_with(len, T::default);
    Ok(all.into_boxed_slice())
}

/// `count` set bits from bit `from` on; `from + count` is at most 64, `count` at least 1.
fn bits(from: u64, count: u64) -> u64 {
    (u64::MAX >> (WORD_BITS - count)) << from
}

/// The number of bit `bit` of `word`.
fn page(word: usize, bit: u32) -> u64 {
    word as u64 * WORD_BITS + u64::from(bit)
}

/// A word's number as an index: it fits, since the words are in memory.
fn index(word: u64) -> usize {
    word as usize
}
