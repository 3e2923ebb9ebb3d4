//! The marks of one page size, in two levels: a word has the marks of 64 pages, and a summary word
//! has a bit for each of 64 words that may have marks.
//!
//! # Why no mark is lost
//! A marker sets the page's bit and *then* ensures that the summary bit is set. A sweeper takes the
//! summary word and *then* the words that it names. Both change the same words by
//! read-modify-write, which orders them. Either the sweeper's exchange finds the mark, or the
//! marker's later operation reads from the sweeper's exchange. In the second case, the marker
//! acquires everything that the sweeper did before: a cleared summary bit, and a newly published
//! table.
//!
//! The marker never skips its read-modify-write, even if a plain load shows the bit set. The load
//! may complete while the marker's own write to the page is still in a store buffer. A drain in
//! between would take the bit and copy the old page. `tests/loom.rs` has that execution.

use std::ops::Range;

use crate::edges::Edges;
use crate::geometry::GeometryError;
use crate::sync::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;
/// The number of words that a walk loads before it looks at them.
const AHEAD: usize = 16;

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
            words: zeros(words)?,
            summary: zeros(words.div_ceil(WORD_BITS))?,
        })
    }

    /// Marks one page. Returns whether it was clean.
    #[inline]
    pub(crate) fn mark_page(&self, page: u64) -> bool {
        debug_assert!(page < self.pages);
        self.mark_word(index(page / WORD_BITS), 1 << (page % WORD_BITS))
    }

    /// Marks the pages of `range`. Returns whether any of them was clean.
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

    /// Marks the pages `bits` of a word. Returns whether any of them was clean.
    #[inline]
    pub(crate) fn mark_word(&self, word: usize, bits: u64) -> bool {
        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;
        set_summary_bit(&self.summary, word, was_clean)
    }

    /// Takes all marks, and calls `each` with the index and the bits of every word that had any.
    pub(crate) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (s, summary) in self.summary.iter().enumerate() {
            // The exchange is needed for an empty word too: a concurrent marker synchronizes with
            // it. A drain would not need it, but without it loom does not order every operation it
            // has to, and mutants go undetected.
            let named = summary.swap(0, Ordering::AcqRel);
            self.take_words(s, named, &mut each);
        }
    }

    /// Clears a table that no thread marks concurrently. Words without marks are only read.
    pub(crate) fn clear(&self) {
        for (s, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) != 0 {
                let named = summary.swap(0, Ordering::AcqRel);
                self.take_words(s, named, |_, _| ());
            }
        }
    }

    /// Takes the marks of the words that are `named` by summary word `s`.
    fn take_words(&self, s: usize, mut named: u64, mut each: impl FnMut(usize, u64)) {
        while named != 0 {
            let word = s * 64 + named.trailing_zeros() as usize;
            named &= named - 1;
            let taken = self.words[word].swap(0, Ordering::AcqRel);
            if taken != 0 {
                each(word, taken);
            }
        }
    }

    /// Returns the bits of one word.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// Returns whether a page is marked.
    pub(crate) fn is_marked(&self, page: u64) -> bool {
        self.word(index(page / WORD_BITS)) >> (page % WORD_BITS) & 1 == 1
    }

    /// Returns the indexes, from `first` on, of the words that may have marks.
    ///
    /// A summary bit may be set for a word without marks. It is never clear for a word with marks.
    #[inline]
    pub(crate) fn marked_words(&self, first: usize) -> impl Iterator<Item = usize> {
        let load = |summary: &AtomicU64| summary.load(Ordering::Acquire);
        let mut s = first / 64;
        let mut named = self.summary.get(s).map_or(0, load) & (u64::MAX << (first % 64));
        std::iter::from_fn(move || {
            while named == 0 {
                s += 1;
                // Most of a walk over few marks is spent here, so eight words are read at a time.
                while s.is_multiple_of(8)
                    && let Some(eight) = self.summary.get(s..s + 8)
                    && eight.iter().fold(0, |any, summary| any | load(summary)) == 0
                {
                    s += 8;
                }
                named = load(self.summary.get(s)?);
            }
            let word = s * 64 + named.trailing_zeros() as usize;
            named &= named - 1;
            Some(word)
        })
    }

    /// Appends the boundaries of the runs of marked pages from page `from` on, until `edges` is
    /// full.
    ///
    /// Returns the page to continue from, or `None` at the end of the table. If `open`, a run
    /// reaches up to page `from`, and the first boundary is its end.
    pub(crate) fn edges(&self, from: u64, open: bool, edges: &mut Edges) -> Option<u64> {
        let (first, skipped) = (index(from / WORD_BITS), from % WORD_BITS);
        let mut words = self.marked_words(first);
        let mut next = first;
        // The bit of the next word that would continue a run which ends with this word.
        let mut carry = u64::from(open) << skipped;
        loop {
            // Loading the words before looking at them overlaps their cache misses.
            let mut ahead = [(0, 0); AHEAD];
            let mut count = 0;
            for (place, word) in ahead.iter_mut().zip(&mut words) {
                *place = (word, self.word(word));
                count += 1;
            }
            if ahead[0].0 == first {
                ahead[0].1 &= u64::MAX << skipped;
            }
            for &(word, bits) in &ahead[..count] {
                if carry != 0 && word != next {
                    edges.push(first_page(next));
                    carry = 0;
                }
                if !edges.has_room() {
                    return Some(first_page(word));
                }
                // An edge is a page whose state differs from that of the page before.
                edges.push_word(first_page(word), bits ^ (bits << 1 | carry));
                carry = bits >> 63;
                next = word + 1;
            }
            if count < AHEAD {
                break;
            }
        }
        if carry != 0 {
            edges.push(first_page(next));
        }
        None
    }

    /// Returns whether no page is marked.
    pub(crate) fn is_clean(&self) -> bool {
        !self.marked_words(0).any(|word| self.word(word) != 0)
    }
}

/// Ensures that the summary bit of `word` is set. Returns `was_clean`.
///
/// Passing `was_clean` through makes the compiler compute it where the mark is set, for which x86
/// has one instruction. Computed after the call, it takes a loop of compare-and-exchange, in which
/// two threads on one word wait for each other twice: marking with two threads took 1.4 times as
/// long.
#[inline]
fn set_summary_bit(summary: &[AtomicU64], word: usize, was_clean: bool) -> bool {
    #[cold]
    #[inline(never)]
    fn set(summary: &AtomicU64, bit: u64, was_clean: bool) -> bool {
        summary.fetch_or(bit, Ordering::AcqRel);
        was_clean
    }
    let (summary, bit) = (&summary[word / 64], 1 << (word % 64));
    match summary.load(Ordering::Acquire) & bit {
        0 => set(summary, bit, was_clean),
        _ => was_clean,
    }
}

/// Allocates `count` zero words. A large allocation is not touched, so the host provides memory
/// only when a mark is set.
#[cfg(not(ramsnap_loom))]
fn zeros(count: u64) -> Result<Box<[AtomicU64]>, GeometryError> {
    use zerocopy::FromZeros;

    let len = usize::try_from(count).ok();
    len.and_then(|len| <[AtomicU64]>::new_box_zeroed_with_elems(len).ok())
        .ok_or_else(|| out_of_memory::<AtomicU64>(count))
}

#[cfg(ramsnap_loom)]
use self::defaults as zeros;

fn out_of_memory<T>(count: u64) -> GeometryError {
    GeometryError::OutOfMemory {
        bytes: count.saturating_mul(size_of::<T>() as u64),
    }
}

/// Allocates `count` default values.
pub(crate) fn defaults<T: Default>(count: u64) -> Result<Box<[T]>, GeometryError> {
    let failed = || out_of_memory::<T>(count);
    let len = usize::try_from(count).map_err(|_| failed())?;
    let mut all = Vec::new();
    all.try_reserve_exact(len).map_err(|_| failed())?;
    all.resize_with(len, T::default);
    Ok(all.into_boxed_slice())
}

/// Returns `count` set bits from bit `from` on. `count` is at least 1, and `from + count` at most
/// 64.
fn bits(from: u64, count: u64) -> u64 {
    (u64::MAX >> (WORD_BITS - count)) << from
}

/// Returns the index of the first page of a word.
fn first_page(word: usize) -> u64 {
    word as u64 * WORD_BITS
}

/// Converts the number of a word to an index. It fits, because the words are in memory.
fn index(word: u64) -> usize {
    word as usize
}
