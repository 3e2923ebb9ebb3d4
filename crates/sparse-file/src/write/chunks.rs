//! Joins adjacent runs and cuts them at chunk borders.

use std::ops::Range;

use super::error::WriteError;

/// An iterator that turns runs into pieces that do not cross a multiple of the chunk size. Reads no
/// runs beyond the current chunk.
#[derive(Debug)]
pub(super) struct Chunks<I> {
    runs: I,
    chunk_size: u64,
    /// The rest of the current run.
    run: Range<u64>,
    /// The run after `run` that was already taken from `runs`.
    next: Option<Result<Range<u64>, WriteError>>,
}

impl<I: Iterator<Item = Range<u64>>> Chunks<I> {
    pub(super) fn new(runs: I, chunk_size: usize) -> Self {
        Self {
            runs,
            chunk_size: chunk_size as u64,
            run: 0..0,
            next: None,
        }
    }

    /// Returns the next run that is not empty, or the reason why it is invalid.
    fn pull(&mut self) -> Option<Result<Range<u64>, WriteError>> {
        let run = self.runs.find(|run| run.start != run.end)?;
        let valid = run.start < run.end && libc::off_t::try_from(run.end).is_ok();
        Some(if valid {
            Ok(run)
        } else {
            Err(WriteError::InvalidRun { run })
        })
    }
}

impl<I: Iterator<Item = Range<u64>>> Iterator for Chunks<I> {
    /// Never empty. The iterator is not called again after an error.
    type Item = Result<Range<u64>, WriteError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.run.is_empty() {
            self.run = match self.next.take().or_else(|| self.pull())? {
                Ok(run) => run,
                Err(error) => return Some(Err(error)),
            };
        }
        // At most 2^62 + 2^30, as offsets are below 2^63.
        let boundary = (self.run.start / self.chunk_size + 1) * self.chunk_size;
        while self.run.end < boundary && self.next.is_none() {
            match self.pull() {
                Some(Ok(run)) if self.run.contains(&run.start) || run.start == self.run.end => {
                    self.run.end = self.run.end.max(run.end);
                }
                Some(other) => self.next = Some(other),
                None => break,
            }
        }
        let end = self.run.end.min(boundary);
        let chunk = self.run.start..end;
        self.run.start = end;
        Some(Ok(chunk))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::nothing(&[], &[])]
    #[case::empty_runs(&[5..5, 0..0], &[])]
    #[case::adjacent_runs_are_one_write(&[0..4, 4..8, 8..12], &[0..12])]
    #[case::empty_run_between_does_not_separate_them(&[0..4, 99..99, 4..8], &[0..8])]
    #[case::overlapping_runs_are_one_write(&[0..8, 4..12], &[0..12])]
    #[case::run_inside_another_is_written_once(&[0..12, 4..8], &[0..12])]
    #[case::gap_is_kept(&[0..4, 5..8], &[0..4, 5..8])]
    #[case::unsorted_runs_keep_their_order(&[8..12, 0..4], &[8..12, 0..4])]
    #[case::cut_at_multiples_of_the_chunk(&[10..40], &[10..16, 16..32, 32..40])]
    #[case::joined_across_a_chunks_end(&[10..16, 16..20], &[10..16, 16..20])]
    #[case::joined_after_a_cut(&[0..20, 20..32], &[0..16, 16..32])]
    fn runs_are_joined_and_cut_into_chunks(
        #[case] runs: &[Range<u64>],
        #[case] chunks: &[Range<u64>],
    ) {
        let made: Vec<_> = Chunks::new(runs.iter().cloned(), 16)
            .map(|chunk| chunk.expect("all runs are valid"))
            .collect();
        assert_eq!(made, chunks);
    }

    #[rstest]
    #[case::ends_before_it_starts(Range { start: 9, end: 8 })]
    #[case::ends_past_the_largest_offset(0..1 << 63)]
    fn invalid_run_is_returned_after_the_runs_before_it(#[case] invalid: Range<u64>) {
        let mut chunks = Chunks::new([0..4, invalid.clone()].into_iter(), 16);
        assert_eq!(chunks.next().expect("a chunk").expect("valid"), 0..4);
        let error = chunks.next().expect("the run").expect_err("invalid");
        assert!(matches!(error, WriteError::InvalidRun { run } if run == invalid));
    }

    #[test]
    fn last_chunk_of_the_largest_file_does_not_overflow() {
        let end = i64::MAX as u64;
        let mut chunks = Chunks::new(std::iter::once(end - 1..end), 1 << 30);
        assert_eq!(
            chunks.next().expect("a chunk").expect("valid"),
            end - 1..end
        );
    }

    #[test]
    fn only_runs_of_the_current_chunk_are_pulled() {
        let mut pulled = 0;
        let runs = (0..1000u64).map(|page| page * 4..page * 4 + 4);
        let mut chunks = Chunks::new(runs.inspect(|_| pulled += 1), 16);
        chunks.next();
        drop(chunks);
        assert_eq!(pulled, 4);
    }
}
