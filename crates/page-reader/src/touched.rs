//! A reader that skips pages known to be zeros.

use std::io;
use std::ops::Range;

use host_memory::HostMemory;

use self::units::{UNIT, UnitSet};
use crate::fault_in::fault_in;
use crate::layout::RamLayout;
use crate::populated::PopulatedRanges;
use crate::reader::PageReader;

mod units;

/// A reader that returns zeros for pages that were never written, without touching them.
///
/// Reading such a page makes the host allocate one: a page for a memfd or tmpfs, a huge page for
/// hugetlbfs. If none is left, a load raises `SIGBUS`. This reader makes the kernel map memory
/// before it is read ([`fault_in`](crate::fault_in())), which reports an error instead.
///
/// The written pages are [determined](PageReader::populated) once, on construction. Pages that a
/// running guest writes later for the first time are not included in reads.
///
/// The reader uses 48 bytes for each written range, and at most 2 bits for each 4 KiB between the
/// first and the last of them. The memory does not grow with the size of the RAM.
///
/// # Examples
/// ```
/// use page_reader::{FileReader, PageReader, Touched};
/// use std::os::unix::fs::FileExt;
///
/// let ram = tempfile::tempfile()?; // 1 GiB, one page of it written
/// ram.set_len(1 << 30)?;
/// ram.write_all_at(&[7; 4096], 64 << 20)?;
///
/// let reader = FileReader::new(&ram);
/// let touched = Touched::new(&reader, 1 << 30);
/// let mut page = [1; 4096];
/// touched.read_at(64 << 20, &mut page)?;
/// assert_eq!(page, [7; 4096]);
/// touched.read_at(0, &mut page)?;
/// assert_eq!(page, [0; 4096]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Touched<'r, R: ?Sized> {
    reader: &'r R,
    ram_size: u64,
    /// The units that may hold nonzero bytes, or `None` if all units may.
    units: Option<UnitSet>,
    faults_in: bool,
}

impl<'r, R: PageReader + ?Sized> Touched<'r, R> {
    /// Returns a reader for the first `ram_size` bytes of `reader`.
    #[must_use]
    pub fn new(reader: &'r R, ram_size: u64) -> Self {
        let mut found = reader.populated(0..ram_size).peekable();
        let all = found.peek().is_some_and(|first| {
            // A single range that covers the RAM needs no set.
            first.start == 0 && first.end >= ram_size
        });
        let units = match all {
            true => None,
            false => Some(UnitSet::of(
                found.map(|range| range.start..range.end.min(ram_size)),
            )),
        };
        Self {
            reader,
            ram_size,
            units,
            faults_in: true,
        }
    }

    /// Returns a reader that treats all pages as written. They are mapped before they are read.
    #[must_use]
    pub fn unknown(reader: &'r R, ram_size: u64) -> Self {
        Self {
            reader,
            ram_size,
            units: None,
            faults_in: true,
        }
    }

    /// Sets whether memory is mapped before it is read, which costs a system call. The default is
    /// `true`.
    #[must_use]
    pub fn faults_in(mut self, faults_in: bool) -> Self {
        self.faults_in = faults_in;
        self
    }

    /// Maps memory that this reader returned, unless this is [disabled](Self::faults_in).
    /// See [`fault_in`](crate::fault_in()).
    ///
    /// # Errors
    /// Returns the errors of [`fault_in`](crate::fault_in()).
    pub fn fault_in(&self, memory: HostMemory<'_>) -> io::Result<()> {
        match self.faults_in {
            true => fault_in(memory),
            false => Ok(()),
        }
    }

    /// Returns whether the bytes at the start of `range`, which must not be empty, may be nonzero,
    /// and the offset at which that changes.
    fn run(&self, range: &Range<u64>) -> (bool, u64) {
        let Some(units) = &self.units else {
            return (true, range.end);
        };
        let within = range.end.min(self.ram_size);
        if range.start >= within {
            // Past the end: the inner reader reports the error.
            return (true, range.end);
        }
        let (touched, units_end) = units.run(range.start / UNIT);
        (touched, units_end.saturating_mul(UNIT).min(within))
    }

    /// Reads bytes that may have been written.
    ///
    /// The kernel maps pages first: a page that cannot be provided is an error instead of a
    /// `SIGBUS` during the copy.
    fn load(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while self.faults_in
            && at < end
            && let Some(memory) = self.reader.host_memory(at, (end - at) as usize)
            && !memory.is_empty()
        {
            fault_in(memory)?;
            at += memory.len() as u64;
        }
        self.reader.read_at(offset, buf)
    }
}

impl<R: PageReader + ?Sized> PageReader for Touched<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut at, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let (touched, until) = self.run(&(at..end));
            let (now, later) = buf.split_at_mut((until - at) as usize);
            match touched {
                true => self.load(at, now)?,
                false => now.fill(0),
            }
            (at, buf) = (until, later);
        }
        Ok(())
    }

    /// Returns `None` for pages that were never written.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let end = offset.checked_add(len as u64).filter(|_| len > 0)?;
        match self.run(&(offset..end)) {
            (true, until) => self.reader.host_memory(offset, (until - offset) as usize),
            (false, _) => None,
        }
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let mut left = range.start..range.end.min(self.ram_size);
        Box::new(std::iter::from_fn(move || {
            while !left.is_empty() {
                let start = left.start;
                let (touched, until) = self.run(&left);
                left.start = until;
                if touched {
                    return Some(start..until);
                }
            }
            None
        }))
    }

    fn check_source(&self) -> io::Result<()> {
        self.reader.check_source()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.reader.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        self.reader.known_size()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn layout_is_that_of_the_wrapped_reader() {
        let bytes = [1_u8; UNIT as usize];
        let layout = RamLayout::single(1 << 32, UNIT).unwrap();
        let memory = [HostMemory::from(&bytes[..])];
        let reader = crate::MappedMemory::new(layout.clone(), memory).unwrap();
        let boxed: Box<dyn PageReader> = Box::new(reader);
        assert_eq!(Touched::unknown(&boxed, UNIT).ram_layout(), Some(&layout));
        assert_eq!(Touched::unknown(&bytes, UNIT).ram_layout(), None);
    }

    /// A reader of 5 units of ones that reports the given ranges as populated.
    struct FixedPopulated(Vec<Range<u64>>);

    impl PageReader for FixedPopulated {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            vec![1; 5 * UNIT as usize].read_at(offset, buf)
        }

        fn populated(&self, _: Range<u64>) -> PopulatedRanges<'_> {
            Box::new(self.0.clone().into_iter())
        }
    }

    #[rstest]
    #[case::nothing(vec![], &[0, 0, 0, 0, 0])]
    #[case::everything(vec![0..5 * UNIT], &[1, 1, 1, 1, 1])]
    #[case::past_the_end(vec![0..u64::MAX], &[1, 1, 1, 1, 1])]
    #[case::a_byte(vec![UNIT + 1..UNIT + 2], &[0, 1, 0, 0, 0])]
    #[case::over_a_border(vec![2 * UNIT - 1..2 * UNIT + 1, 4 * UNIT..5 * UNIT], &[0, 1, 1, 0, 1])]
    #[case::overlapping(vec![0..2 * UNIT, UNIT..3 * UNIT], &[1, 1, 1, 0, 0])]
    #[case::descending(vec![3 * UNIT..4 * UNIT, 0..1], &[1, 0, 0, 1, 0])]
    fn unwritten_units_are_zeros_without_a_read(
        #[case] populated: Vec<Range<u64>>,
        #[case] expected: &[u8],
    ) {
        let reader = FixedPopulated(populated);
        let touched = Touched::new(&reader, 5 * UNIT);
        let mut all = vec![7; 5 * UNIT as usize];
        touched.read_at(0, &mut all).unwrap();
        for (unit, expected) in all.chunks(UNIT as usize).zip(expected) {
            assert!(unit.iter().all(|byte| byte == expected));
        }
        let (mut part, start) = (vec![7; 2 * UNIT as usize], UNIT / 2);
        touched.read_at(start, &mut part).unwrap();
        assert!(part == all[start as usize..][..part.len()]);
        let found: u64 = touched
            .populated(0..5 * UNIT)
            .map(|one| one.end - one.start)
            .sum();
        let ones: u64 = expected.iter().map(|one| u64::from(*one)).sum();
        assert_eq!(found, ones * UNIT);
    }

    #[test]
    fn reading_past_the_end_returns_the_inner_error() {
        let reader = FixedPopulated(vec![0..UNIT]);
        let touched = Touched::new(&reader, 5 * UNIT);
        for (offset, len) in [(5 * UNIT, 1), (5 * UNIT - 1, 2), (u64::MAX, 2)] {
            let error = touched.read_at(offset, &mut vec![0; len]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset}");
        }
    }
}
