//! The parts of the RAM that a full dump can't leave out, found while it is being written.
//!
//! The reader is a [`Touched`]: what it knows to be untouched is never read, whatever is left out.

use std::ops::{ControlFlow, Range};

use page_reader::{HostMemory, PageReader, PopulatedRanges, SecretBuffer, Touched};

use crate::meter::Meter;
use crate::pages::WholePages;

/// What a full dump may leave out, where it reads as zeros without being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skip {
    /// Pages of zeros, found by reading them.
    pub(crate) zeros: bool,
    /// What the reader knows that nobody wrote.
    pub(crate) untouched: bool,
}

impl Skip {
    pub(crate) fn anything(self) -> bool {
        self.zeros || self.untouched
    }
}

/// Fewer bytes of zeros than this are written with what is around them: an extent more in the file takes longer.
const WORTH: u64 = 32 << 10;
/// Zeros are looked for in pages of at least so many bytes: those of hosts, and the blocks of most file systems.
const SMALLEST_PAGE: u64 = 4 << 10;
/// Runs end where a multiple of this does, so that what was just looked at is written before more is.
const STRETCH: u64 = 1 << 20;
/// Bytes read at a time from a reader that hands out no memory.
const WINDOW: u64 = 256 << 10;

/// Runs of whole pages, ascending. What is between them may be left out.
pub(crate) struct Needed<'a, 'w, R: ?Sized> {
    reader: &'a Touched<'a, R>,
    zeros: bool,
    page_size: u64,
    ram_size: u64,
    /// What may hold anything but zeros, beyond `left`.
    populated: WholePages<PopulatedRanges<'a>>,
    /// What is left of the range in hand, to be looked at.
    left: Range<u64>,
    /// What was found and not given out yet. Empty, it is where the last run ended.
    run: Range<u64>,
    /// Up to where the meter knows.
    counted: u64,
    window: Window,
    /// Memory that the kernel has faulted in.
    mapped: Range<u64>,
    meter: &'a Meter<'w>,
}

impl<'a, 'w, R: PageReader + ?Sized> Needed<'a, 'w, R> {
    /// `ram_size` is a multiple of `page_size`, which is a power of two.
    pub(crate) fn new(
        reader: &'a Touched<'a, R>,
        skip: Skip,
        ram_size: u64,
        page_size: u64,
        meter: &'a Meter<'w>,
    ) -> Self {
        let page_size = page_size.max(SMALLEST_PAGE);
        // Zeros are left out where nobody wrote them, too.
        let populated = reader.populated(0..ram_size);
        Self {
            reader,
            zeros: skip.zeros,
            page_size,
            ram_size,
            populated: WholePages::new(populated, page_size),
            left: 0..0,
            run: 0..0,
            counted: 0,
            window: Window::default(),
            mapped: 0..0,
            meter,
        }
    }

    /// What is next to be looked at, all of which is needed or not.
    fn part(&self) -> Range<u64> {
        let Range { start, end } = self.left;
        let step = if self.zeros { self.page_size } else { STRETCH };
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
            // What cannot be had is not zero: writing it will say why.
            if !self.is_mapped(at..end) || !memory.is_zero() {
                return false;
            }
            at = end;
        }
        true
    }

    /// Faults memory in, with what follows it: a load that finds no page is a `SIGBUS`.
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
        // What follows may be what can't be had.
        let asked = (range.end - range.start) as usize;
        let memory = self.reader.host_memory(range.start, asked);
        memory.is_some_and(|memory| memory.len() >= asked && self.reader.fault_in(memory).is_ok())
    }

    fn take_run(&mut self) -> Range<u64> {
        let run = self.run.clone();
        self.run.start = run.end;
        run
    }

    /// Everything between the last run and `end` is left out.
    fn left_out(&mut self, end: u64) -> ControlFlow<()> {
        let bytes = end - self.counted.max(self.run.end).min(end);
        self.counted = end;
        self.meter.left_out(bytes)
    }
}

impl<R: PageReader + ?Sized> Iterator for Needed<'_, '_, R> {
    type Item = Range<u64>;

    /// Ends early once the meter says so.
    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            if self.left.is_empty() {
                match self.populated.next() {
                    // The last page may be smaller. A reader that goes back breaks its contract, and must do no more harm.
                    Some(range) => {
                        self.left = range.start.max(self.run.end)..range.end.min(self.ram_size);
                        continue;
                    }
                    None if self.run.is_empty() => {
                        let _ = self.left_out(self.ram_size);
                        return None;
                    }
                    None => return Some(self.take_run()),
                }
            }
            let worth = self.left.start - self.run.end >= WORTH;
            if worth && !self.run.is_empty() {
                return Some(self.take_run());
            }
            let part = self.part();
            let skipped = self.zeros && self.is_zero(part.clone());
            self.left.start = part.end;
            if skipped {
                let stretch = part.end.is_multiple_of(STRETCH);
                if worth && stretch && self.left_out(part.end).is_break() {
                    return None;
                }
                continue;
            }
            if worth {
                if self.left_out(part.start).is_break() {
                    return None;
                }
                self.run.start = part.start;
            }
            self.run.end = part.end;
            if part.end.is_multiple_of(STRETCH) {
                return Some(self.take_run());
            }
        }
    }
}

/// Bytes read ahead from a reader that hands out no memory. They are looked at and read again if they are to be written.
#[derive(Default)]
struct Window {
    range: Range<u64>,
    buffer: SecretBuffer,
}

impl Window {
    /// Bytes that can't be read are not zero: writing them will tell why. Reads no further than `last`.
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
