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

use std::ops::Range;

use crate::edges::Edges;
use crate::geometry::GeometryError;
use crate::sync::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;
/// Words that a walk loads at once.
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
        let was_clean = self.words[word].fetch_or(bits, Ordering::AcqRel) & bits != bits;
        name(&self.summary, word, was_clean)
    }

    /// Takes every mark out, word by word: index of the word, its bits.
    pub(crate) fn take(&self, mut each: impl FnMut(usize, u64)) {
        for (s, summary) in self.summary.iter().enumerate() {
            // An exchange, also of a word that looks empty: it is what a concurrent marker synchronises with. A drain could do
            // without, but loom would then not order all that it has to: mutants go undetected.
            let named = summary.swap(0, Ordering::AcqRel);
            self.take_named(s, named, &mut each);
        }
    }

    /// Forgets every mark of a table that nothing marks meanwhile: words without any are only looked at.
    pub(crate) fn clear(&self) {
        for (s, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) != 0 {
                let named = summary.swap(0, Ordering::AcqRel);
                self.take_named(s, named, |_, _| ());
            }
        }
    }

    /// Takes the marks of those words that summary word `s` named.
    fn take_named(&self, s: usize, mut named: u64, mut each: impl FnMut(usize, u64)) {
        while named != 0 {
            let word = s * 64 + named.trailing_zeros() as usize;
            named &= named - 1;
            let taken = self.words[word].swap(0, Ordering::AcqRel);
            if taken != 0 {
                each(word, taken);
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

    /// The words from `first` on that may have a mark: a summary bit may outlive its word's marks, never the other way round.
    #[inline]
    pub(crate) fn marked_words(&self, first: usize) -> impl Iterator<Item = usize> {
        let load = |summary: &AtomicU64| summary.load(Ordering::Acquire);
        let mut s = first / 64;
        let mut named = self.summary.get(s).map_or(0, load) & (u64::MAX << (first % 64));
        std::iter::from_fn(move || {
            while named == 0 {
                s += 1;
                // Where little is marked, this is what a walk is: several at a time.
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

    /// Adds where runs of marked pages begin and end, from page `from` on, as far as there is room; where it ran out, says at which page
    /// to go on. With a run `open` that reaches up to page `from`, the first edge is its end.
    pub(crate) fn edges(&self, from: u64, open: bool, edges: &mut Edges) -> Option<u64> {
        let (first, skipped) = (index(from / WORD_BITS), from % WORD_BITS);
        let mut words = self.marked_words(first);
        let mut next = first;
        // Where a run reaches up to the next word, the bit of that word that goes on with it.
        let mut carry = u64::from(open) << skipped;
        loop {
            // Loaded before any of them is looked at: where they are far apart, they are waited for together.
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
                // An edge is where a page differs from the one before.
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

    /// Whether no page is marked.
    pub(crate) fn is_clean(&self) -> bool {
        !self.marked_words(0).any(|word| self.word(word) != 0)
    }
}

/// Makes sure that the summary names `word`. Passes on whether what was marked there was clean: so the compiler asks for that where the mark is
/// set, for which x86 has one instruction. Asked after the summary, it takes a loop of compare-and-exchange, in which two threads on one word wait
/// for each other twice (marking with two threads took 1.4 times as long).
#[inline]
fn name(summary: &[AtomicU64], word: usize, was_clean: bool) -> bool {
    #[cold]
    #[inline(never)]
    fn set(names: &AtomicU64, bit: u64, was_clean: bool) -> bool {
        names.fetch_or(bit, Ordering::AcqRel);
        was_clean
    }
    let (names, bit) = (&summary[word / 64], 1 << (word % 64));
    match names.load(Ordering::Acquire) & bit {
        0 => set(names, bit, was_clean),
        _ => was_clean,
    }
}

/// `count` words of 0, or why there is no memory for them. Large ones are not touched: the host gives memory when a mark is set.
#[cfg(not(memsnap_loom))]
fn zeros(count: u64) -> Result<Box<[AtomicU64]>, GeometryError> {
    use zerocopy::FromZeros;

    let len = usize::try_from(count).ok();
    len.and_then(|len| <[AtomicU64]>::new_box_zeroed_with_elems(len).ok())
        .ok_or_else(|| no_memory::<AtomicU64>(count))
}

#[cfg(memsnap_loom)]
fn zeros(count: u64) -> Result<Box<[AtomicU64]>, GeometryError> {
    defaults(count)
}

fn no_memory<T>(count: u64) -> GeometryError {
    GeometryError::OutOfMemory {
        bytes: count.saturating_mul(size_of::<T>() as u64),
    }
}

/// `count` defaults, or why there is no memory for them.
pub(crate) fn defaults<T: Default>(count: u64) -> Result<Box<[T]>, GeometryError> {
    let failed = || no_memory::<T>(count);
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

/// The number of a word's first page.
fn first_page(word: usize) -> u64 {
    word as u64 * WORD_BITS
}

/// A word's number as an index: it fits, since the words are in memory.
fn index(word: u64) -> usize {
    word as usize
}
