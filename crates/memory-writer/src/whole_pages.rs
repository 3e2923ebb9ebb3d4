//! Converts the runs of a bitmap to runs of whole pages of the memory file.

use std::ops::Range;

/// Iterator that widens ascending runs to multiples of the page size and joins runs that then touch
/// or overlap. No page occurs twice.
pub(crate) struct WholePages<I: Iterator> {
    runs: std::iter::Peekable<I>,
    page_size: u64,
}

impl<I: Iterator<Item = Range<u64>>> WholePages<I> {
    /// Creates the iterator. `page_size` is a power of two, and the end of the last run rounds up
    /// to at most 2^63.
    pub(crate) fn new(runs: I, page_size: u64) -> Self {
        Self {
            runs: runs.peekable(),
            page_size,
        }
    }

    fn widen(page_size: u64, run: &Range<u64>) -> Range<u64> {
        run.start & !(page_size - 1)..run.end.next_multiple_of(page_size)
    }
}

impl<I: Iterator<Item = Range<u64>>> Iterator for WholePages<I> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let page_size = self.page_size;
        let mut pages = Self::widen(page_size, &self.runs.next()?);
        while let Some(next) = self
            .runs
            .next_if(|run| Self::widen(page_size, run).start <= pages.end)
        {
            pages.end = Self::widen(page_size, &next).end;
        }
        Some(pages)
    }
}

#[cfg(test)]
mod tests {
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
    fn runs_are_widened_to_whole_pages(#[case] runs: &[Range<u64>], #[case] pages: &[Range<u64>]) {
        let widened: Vec<_> = WholePages::new(runs.iter().cloned(), 4096).collect();
        assert_eq!(widened, pages);
    }
}
