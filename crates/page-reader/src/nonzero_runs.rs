//! Finds the runs of RAM that hold data, for copies without zeros.

use std::fmt;
use std::ops::{ControlFlow, Range};

use host_memory::SecretBuffer;

use crate::populated::PopulatedRanges;
use crate::reader::PageReader;
use crate::touched::Touched;
use crate::zeros::{MIN_ZEROS, is_zeros};

/// Minimum size of the pages that are compared with zeros: the page size of most hosts, and the
/// block size of most file systems.
const MIN_PAGE_SIZE: u64 = 4 << 10;
/// Runs end at multiples of this, so that memory is written soon after it was examined.
const MAX_RUN: u64 = 1 << 20;
/// Bytes read at a time from a reader that does not expose its memory.
const WINDOW: u64 = 256 << 10;

/// An iterator over the runs of whole pages that may hold nonzero bytes, ascending.
///
/// A full copy of a guest's RAM may skip the pages between the runs, where they read as zeros
/// without being written. RAM that the reader [knows](PageReader::populated) to be untouched is
/// never read. Runs end at multiples of 1 MiB, so that memory can be copied soon after it was
/// examined. Zeros of less than 32 KiB are part of the run around them.
///
/// # Examples
/// ```
/// use page_reader::{NonzeroRuns, Touched};
///
/// let mut ram = vec![0_u8; 1 << 20];
/// ram[500_000] = 7;
/// let reader = Touched::new(&ram, 1 << 20);
/// let runs = NonzeroRuns::new(&reader, 1 << 20, 4096).find_zeros(true);
/// assert!(runs.eq([499_712..503_808]));
/// ```
#[must_use = "iterators do nothing until they are consumed"]
pub struct NonzeroRuns<'a, R: ?Sized> {
    reader: &'a Touched<'a, R>,
    find_zeros: bool,
    page_size: u64,
    ram_size: u64,
    /// Ranges after `left` that may hold data.
    populated: PopulatedRanges<'a>,
    /// The part of the current range that is not examined yet.
    left: Range<u64>,
    /// The run that was found and not returned yet. If empty, its position is the end of the last
    /// run.
    run: Range<u64>,
    /// Offset up to which skipped bytes are reported.
    reported: u64,
    window: Window,
    /// Memory that the kernel has faulted in.
    mapped: Range<u64>,
    on_skip: Box<dyn FnMut(u64) -> ControlFlow<()> + 'a>,
}

impl<'a, R: PageReader + ?Sized> NonzeroRuns<'a, R> {
    /// Creates an iterator that skips the pages which the reader knows to be untouched. `ram_size`
    /// is a multiple of `page_size`, which is a power of two. Pages of less than 4 KiB are examined
    /// together.
    pub fn new(reader: &'a Touched<'a, R>, ram_size: u64, page_size: u64) -> Self {
        Self {
            reader,
            find_zeros: false,
            page_size: page_size.max(MIN_PAGE_SIZE),
            ram_size,
            populated: reader.populated(0..ram_size),
            left: 0..0,
            run: 0..0,
            reported: 0,
            window: Window::default(),
            mapped: 0..0,
            on_skip: Box::new(|_| ControlFlow::Continue(())),
        }
    }

    /// Sets whether to read the other pages, and to skip those that hold only zeros. The default is
    /// false.
    pub fn find_zeros(mut self, find: bool) -> Self {
        self.find_zeros = find;
        self
    }

    /// Calls `callback` with the number of bytes of each part that is skipped. The iterator ends
    /// early if it returns [`ControlFlow::Break`].
    pub fn on_skip(mut self, callback: impl FnMut(u64) -> ControlFlow<()> + 'a) -> Self {
        self.on_skip = Box::new(callback);
        self
    }

    /// Returns the next part to examine. It is written or skipped as a whole.
    fn next_part(&self) -> Range<u64> {
        let Range { start, end } = self.left;
        let step = if self.find_zeros {
            self.page_size
        } else {
            MAX_RUN
        };
        start..(start / step + 1).saturating_mul(step).min(end)
    }

    fn is_zero(&mut self, range: Range<u64>) -> bool {
        let mut at = range.start;
        while at < range.end {
            let Some(memory) = self.reader.host_memory(at, (range.end - at) as usize) else {
                let last = self.left.end;
                return self.window.is_zero(self.reader, at..range.end, last);
            };
            let end = at + memory.len() as u64;
            // Memory that cannot be faulted in counts as not zero: the write reports the error.
            if !self.is_mapped(at..end) || !memory.is_zero() {
                return false;
            }
            at = end;
        }
        true
    }

    /// Faults in memory together with the memory after it: loading a page that cannot be provided
    /// raises `SIGBUS`.
    fn is_mapped(&mut self, range: Range<u64>) -> bool {
        if self.mapped.start <= range.start && range.end <= self.mapped.end {
            return true;
        }
        let most = WINDOW.max(range.end - range.start);
        let len = self.left.end.saturating_sub(range.start).min(most);
        let Some(memory) = self.reader.host_memory(range.start, len as usize) else {
            return false;
        };
        if self.reader.fault_in(memory).is_ok() {
            self.mapped = range.start..range.start + memory.len() as u64;
            return range.end <= self.mapped.end;
        }
        // The failure may be in the memory after the requested range.
        let asked = (range.end - range.start) as usize;
        let memory = self.reader.host_memory(range.start, asked);
        memory.is_some_and(|memory| memory.len() >= asked && self.reader.fault_in(memory).is_ok())
    }

    fn take_run(&mut self) -> Range<u64> {
        let run = self.run.clone();
        self.run.start = run.end;
        run
    }

    /// Reports everything between the last run and `end` as skipped.
    fn report_skipped(&mut self, end: u64) -> ControlFlow<()> {
        let bytes = end - self.reported.max(self.run.end).min(end);
        self.reported = end;
        match bytes {
            0 => ControlFlow::Continue(()),
            bytes => (self.on_skip)(bytes),
        }
    }
}

impl<R: PageReader + ?Sized> Iterator for NonzeroRuns<'_, R> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            if self.left.is_empty() {
                match self.populated.next() {
                    // Widened to whole pages, the range may overlap what was examined already. The
                    // last page may be smaller.
                    Some(range) => {
                        let start = range.start & !(self.page_size - 1);
                        let end = range.end.next_multiple_of(self.page_size);
                        self.left = start.max(self.left.end)..end.min(self.ram_size);
                        self.left.end = self.left.end.max(self.left.start);
                        continue;
                    }
                    None if self.run.is_empty() => {
                        let _ = self.report_skipped(self.ram_size);
                        return None;
                    }
                    None => return Some(self.take_run()),
                }
            }
            let long_enough = self.left.start - self.run.end >= MIN_ZEROS;
            if long_enough && !self.run.is_empty() {
                return Some(self.take_run());
            }
            let part = self.next_part();
            let skipped = self.find_zeros && self.is_zero(part.clone());
            self.left.start = part.end;
            if skipped {
                let at_border = part.end.is_multiple_of(MAX_RUN);
                if long_enough && at_border && self.report_skipped(part.end).is_break() {
                    return None;
                }
                continue;
            }
            if long_enough {
                if self.report_skipped(part.start).is_break() {
                    return None;
                }
                self.run.start = part.start;
            }
            self.run.end = part.end;
            if part.end.is_multiple_of(MAX_RUN) {
                return Some(self.take_run());
            }
        }
    }
}

impl<R: ?Sized> fmt::Debug for NonzeroRuns<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NonzeroRuns")
            .field("find_zeros", &self.find_zeros)
            .field("page_size", &self.page_size)
            .field("ram_size", &self.ram_size)
            .field("left", &self.left)
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

/// Bytes read ahead from a reader that does not expose its memory. They are examined, and read
/// again if they must be written.
#[derive(Default)]
struct Window {
    range: Range<u64>,
    buffer: SecretBuffer,
}

impl Window {
    /// Returns whether bytes are zeros. Bytes that cannot be read count as not zero: the write
    /// reports the error. Reads no further than `last`.
    fn is_zero<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        range: Range<u64>,
        last: u64,
    ) -> bool {
        if range.start < self.range.start || self.range.end < range.end {
            let len = (last - range.start).min(WINDOW.max(range.end - range.start));
            self.range = 0..0;
            if reader
                .read_at(range.start, self.buffer.sized(len as usize))
                .is_err()
            {
                return false;
            }
            self.range = range.start..range.start + len;
        }
        let bytes = self.buffer.sized((range.end - self.range.start) as usize);
        is_zeros(&bytes[(range.start - self.range.start) as usize..])
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const KIB: u64 = 1 << 10;

    fn runs(ram: &[u8], page_size: u64, find_zeros: bool) -> (Vec<Range<u64>>, u64) {
        let size = ram.len() as u64;
        let (reader, mut skipped) = (Touched::unknown(ram, size), 0);
        let found = NonzeroRuns::new(&reader, size, page_size)
            .find_zeros(find_zeros)
            .on_skip(|bytes| {
                skipped += bytes;
                ControlFlow::Continue(())
            })
            .collect();
        (found, skipped)
    }

    #[rstest]
    #[case::all_zeros(&[], 4096, &[])]
    #[case::one_page(&[100 * KIB], 4096, &[100 * KIB..104 * KIB])]
    #[case::larger_pages(&[100 * KIB], 16384, &[96 * KIB..112 * KIB])]
    #[case::small_pages_are_examined_together(&[100 * KIB], 512, &[100 * KIB..104 * KIB])]
    #[case::short_zeros_are_kept(&[0, 32 * KIB], 4096, &[0..36 * KIB])]
    #[case::zeros_of_32_kib_are_skipped(&[0, 36 * KIB], 4096, &[0..4 * KIB, 36 * KIB..40 * KIB])]
    #[case::runs_end_at_whole_mebibytes(
        &[1020 * KIB, 1024 * KIB],
        4096,
        &[1020 * KIB..1024 * KIB, 1024 * KIB..1028 * KIB]
    )]
    fn runs_hold_every_nonzero_page(
        #[case] nonzero: &[u64],
        #[case] page_size: u64,
        #[case] expected: &[Range<u64>],
    ) {
        let mut ram = vec![0; 2 << 20];
        nonzero.iter().for_each(|at| ram[*at as usize] = 1);
        let (found, skipped) = runs(&ram, page_size, true);
        assert_eq!(found, expected);
        let kept: u64 = found.iter().map(|run| run.end - run.start).sum();
        assert_eq!(kept + skipped, 2 << 20);
    }

    #[test]
    fn zeros_are_kept_unless_they_are_looked_for() {
        let (found, skipped) = runs(&vec![0; 3 << 20], 4096, false);
        assert_eq!(found, [0..1 << 20, 1 << 20..2 << 20, 2 << 20..3 << 20]);
        assert_eq!(skipped, 0);
    }

    #[test]
    fn a_break_ends_the_runs() {
        let mut ram = vec![0; 2 << 20];
        ram[(2 << 20) - 1] = 1;
        let reader = Touched::unknown(&ram, 2 << 20);
        let mut runs = NonzeroRuns::new(&reader, 2 << 20, 4096)
            .find_zeros(true)
            .on_skip(|_| ControlFlow::Break(()));
        assert_eq!(runs.next(), None);
    }
}
