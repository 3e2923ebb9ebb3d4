//! Adapters for iterators of ascending byte ranges, and the runs of set bits in words.

use std::iter::{FusedIterator, Peekable};
use std::ops::Range;

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

/// An iterator that joins ascending ranges which touch or overlap.
///
/// Created by [`coalesce`] and [`coalesce_within`].
#[derive(Clone, Debug)]
#[must_use = "iterators do nothing until they are consumed"]
pub struct Coalesce<I: Iterator<Item = Range<u64>>> {
    ranges: Peekable<I>,
    max_gap: u64,
}

/// Joins ascending ranges that touch or overlap.
///
/// # Examples
/// ```
/// let ranges = [0..2, 2..5, 4..6, 9..10];
/// assert!(dirty_bitmap::coalesce(ranges).eq([0..6, 9..10]));
/// ```
pub fn coalesce<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Coalesce<I::IntoIter> {
    coalesce_within(ranges, 0)
}

/// Joins ascending ranges with at most `max_gap` bytes between them. The gaps become part of the
/// result.
///
/// # Examples
/// ```
/// let ranges = [0..2, 4..5, 8..9];
/// assert!(dirty_bitmap::coalesce_within(ranges, 2).eq([0..5, 8..9]));
/// ```
pub fn coalesce_within<I: IntoIterator<Item = Range<u64>>>(
    ranges: I,
    max_gap: u64,
) -> Coalesce<I::IntoIter> {
    Coalesce {
        ranges: ranges.into_iter().peekable(),
        max_gap,
    }
}

impl<I: Iterator<Item = Range<u64>>> Iterator for Coalesce<I> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        let mut joined = self.ranges.next()?;
        let max_gap = self.max_gap;
        while let Some(next) = self
            .ranges
            .next_if(|next| next.start <= joined.end.saturating_add(max_gap))
        {
            joined.end = joined.end.max(next.end);
        }
        Some(joined)
    }
}

impl<I: FusedIterator<Item = Range<u64>>> FusedIterator for Coalesce<I> {}

/// Widens ascending ranges to whole pages, and joins those that then touch or overlap. No page
/// occurs twice.
///
/// `page_size` is a power of two, and the end of the last range rounds up to less than 2^64.
///
/// # Examples
/// ```
/// let pages = dirty_bitmap::whole_pages([0..1, 4096..4097, 9000..9001], 4096);
/// assert!(pages.eq([0..12288]));
/// ```
pub fn whole_pages<I: IntoIterator<Item = Range<u64>>>(
    ranges: I,
    page_size: u64,
) -> Coalesce<impl Iterator<Item = Range<u64>>> {
    coalesce(
        ranges
            .into_iter()
            .map(move |range| widen(&range, page_size)),
    )
}

/// Returns the whole pages that `range` touches. `page_size` is a power of two.
pub(crate) fn widen(range: &Range<u64>, page_size: u64) -> Range<u64> {
    range.start & !(page_size - 1)..range.end.next_multiple_of(page_size)
}

/// Returns the maximal runs of set bits, as ascending ranges of indexes.
///
/// # Examples
/// ```
/// use bitvec::prelude::{Lsb0, bitvec};
///
/// let bits = bitvec![u64, Lsb0; 0, 1, 1, 0, 1];
/// assert!(dirty_bitmap::runs_of(&bits).eq([1..3, 4..5]));
/// ```
pub fn runs_of(bits: &BitSlice<u64, Lsb0>) -> impl Iterator<Item = Range<u64>> {
    // Words are aligned in memory, and the first bit may be inside a word.
    let skipped = u64::from(bits.as_bitptr().raw_parts().1.into_inner());
    let words = bits.domain().zip((0..).step_by(u64::BITS as usize));
    coalesce(words.flat_map(move |(word, first)| {
        runs_of_word(word).map(move |run| first + run.start - skipped..first + run.end - skipped)
    }))
}

/// Returns the runs of set bits in a word, as ascending ranges of bit numbers.
#[inline]
pub(crate) fn runs_of_word(mut word: u64) -> impl Iterator<Item = Range<u64>> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let start = word.trailing_zeros();
        let len = (word >> start).trailing_ones();
        word &= !(u64::MAX >> (u64::BITS - len) << start);
        Some(u64::from(start)..u64::from(start + len))
    })
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use bitvec::vec::BitVec;
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::nothing(&[], &[])]
    #[case::whole_pages_are_unchanged(&[0..4096, 8192..16384], &[0..4096, 8192..16384])]
    #[case::byte_becomes_its_page(&[5000..5001], &[4096..8192])]
    #[case::run_across_a_border_becomes_both_pages(&[4095..4097], &[0..8192])]
    #[case::two_runs_in_a_page_become_one_page(&[0..512, 1024..1536], &[0..4096])]
    #[case::runs_that_touch_only_when_widened_are_joined(&[0..512, 4096..4608], &[0..8192])]
    #[case::many_in_a_row(&[0..1, 4096..4097, 8192..8193, 16384..16385], &[0..12288, 16384..20480])]
    fn ranges_are_widened_to_whole_pages(
        #[case] ranges: &[Range<u64>],
        #[case] pages: &[Range<u64>],
    ) {
        let widened: Vec<_> = whole_pages(ranges.iter().cloned(), 4096).collect();
        assert_eq!(widened, pages);
    }

    #[rstest]
    #[case::apart(&[0..4, 5..8], 0, &[0..4, 5..8])]
    #[case::gap_of_the_limit(&[0..4, 6..8], 2, &[0..8])]
    #[case::gap_over_the_limit(&[0..4, 7..8], 2, &[0..4, 7..8])]
    #[case::inside_the_one_before(&[0..12, 4..8, 12..13], 0, &[0..13])]
    #[case::to_the_last_offset(&[0..u64::MAX, 7..8], 1, &[0..u64::MAX])]
    fn ranges_with_small_gaps_are_joined(
        #[case] ranges: &[Range<u64>],
        #[case] max_gap: u64,
        #[case] joined: &[Range<u64>],
    ) {
        assert!(coalesce_within(ranges.iter().cloned(), max_gap).eq(joined.iter().cloned()));
    }

    proptest! {
        #[test]
        fn runs_are_the_set_bits_of_any_slice(
            words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..5),
            ends in (0..=320_usize, 0..=320_usize),
        ) {
            let bits = BitVec::<u64, Lsb0>::from_vec(words);
            let (start, end) = (ends.0.min(ends.1).min(bits.len()), ends.0.max(ends.1).min(bits.len()));
            let slice = &bits[start..end];
            let runs: Vec<_> = runs_of(slice).collect();
            prop_assert!(runs.iter().all(|run| !run.is_empty()));
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let ones: Vec<_> = runs.into_iter().flatten().collect();
            prop_assert_eq!(ones, slice.iter_ones().map(|one| one as u64).collect::<Vec<_>>());
        }
    }
}
