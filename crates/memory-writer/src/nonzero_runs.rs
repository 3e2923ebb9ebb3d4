//! Finds the runs of a full dump that must be written, while it is being written.
//!
//! The reader is a [`Touched`]: RAM that is known to be untouched is never read.

use std::ops::{ControlFlow, Range};

use page_reader::{HostMemory, PageReader, PopulatedRanges, SecretBuffer, Touched};

use crate::progress::ProgressCounter;
use crate::whole_pages::WholePages;

/// The pages that a full dump may skip, where they read as zeros without being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skip {
    /// Pages of zeros, found by reading them.
    pub(crate) zeros: bool,
    /// Pages that the reader knows to be untouched.
    pub(crate) untouched: bool,
}

impl Skip {
    pub(crate) fn is_enabled(self) -> bool {
        self.zeros || self.untouched
    }
}

/// Minimum length of zeros to skip. Shorter ones are written with the data around them: another
/// extent in the file takes longer.
const MIN_SKIP: u64 = 32 << 10;
/// Minimum size of the pages that are compared with zeros: the page size of most hosts, and the
/// block size of most file systems.
const MIN_PAGE_SIZE: u64 = 4 << 10;
/// Runs end at multiples of this, so that memory is written soon after it was examined.
const MAX_RUN: u64 = 1 << 20;
/// Bytes read at a time from a reader that does not expose its memory.
const WINDOW: u64 = 256 << 10;

/// Iterator over ascending runs of whole pages that must be written. The pages between the runs may
/// be skipped.
pub(crate) struct NonzeroRuns<'a, 'w, R: ?Sized> {
    reader: &'a Touched<'a, R>,
    zeros: bool,
    page_size: u64,
    ram_size: u64,
    /// Ranges after `left` that may hold data.
    populated: WholePages<PopulatedRanges<'a>>,
    /// The part of the current range that is not examined yet.
    left: Range<u64>,
    /// The run that was found and not returned yet. If empty, its position is the end of the last
    /// run.
    run: Range<u64>,
    /// Offset up to which skipped bytes are reported as progress.
    reported: u64,
    window: Window,
    /// Memory that the kernel has faulted in.
    mapped: Range<u64>,
    progress: &'a ProgressCounter<'w>,
}

impl<'a, 'w, R: PageReader + ?Sized> NonzeroRuns<'a, 'w, R> {
    /// Creates an iterator. `ram_size` is a multiple of `page_size`, which is a power of two.
    pub(crate) fn new(
        reader: &'a Touched<'a, R>,
        skip: Skip,
        ram_size: u64,
        page_size: u64,
        progress: &'a ProgressCounter<'w>,
    ) -> Self {
        let page_size = page_size.max(MIN_PAGE_SIZE);
        // Option `zeros` includes untouched pages.
        let populated = reader.populated(0..ram_size);
        Self {
            reader,
            zeros: skip.zeros,
            page_size,
            ram_size,
            populated: WholePages::new(populated, page_size),
            left: 0..0,
            run: 0..0,
            reported: 0,
            window: Window::default(),
            mapped: 0..0,
            progress,
        }
    }

    /// Returns the next part to examine. It is written or skipped as a whole.
    fn next_part(&self) -> Range<u64> {
        let Range { start, end } = self.left;
        let step = if self.zeros { self.page_size } else { MAX_RUN };
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
        self.progress.skipped(bytes)
    }
}

impl<R: PageReader + ?Sized> Iterator for NonzeroRuns<'_, '_, R> {
    type Item = Range<u64>;

    /// Returns `None` early if the progress report requests it.
    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            if self.left.is_empty() {
                match self.populated.next() {
                    // The last page may be smaller. A reader whose ranges descend breaks its
                    // contract; skip what was examined before.
                    Some(range) => {
                        self.left = range.start.max(self.run.end)..range.end.min(self.ram_size);
                        continue;
                    }
                    None if self.run.is_empty() => {
                        let _ = self.report_skipped(self.ram_size);
                        return None;
                    }
                    None => return Some(self.take_run()),
                }
            }
            let long_enough = self.left.start - self.run.end >= MIN_SKIP;
            if long_enough && !self.run.is_empty() {
                return Some(self.take_run());
            }
            let part = self.next_part();
            let skipped = self.zeros && self.is_zero(part.clone());
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
        HostMemory::from(&bytes[(range.start - self.range.start) as usize..]).is_zero()
    }
}
