//! The pages of a RAM block in a mapped-ram file: a bitmap of stored pages, and a place for each.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes of the bitmap that are read at a time: the bits of 128 MiB in pages of 4 KiB.
const BITMAP_STEP: u64 = 4096;

/// A RAM block whose stored pages are at their own offset from `pages_at`. Pages without a bit in
/// the bitmap are zeros. The bitmap is read when it is needed: a file may claim one of any length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappedPages {
    /// The position of the bitmap: little-endian words, the lowest bit first, which are bytes.
    pub(crate) bitmap_at: u64,
    pub(crate) pages_at: u64,
    pub(crate) page_size: u64,
}

impl MappedPages {
    /// Returns the parts of `range`, in bytes of the block, that are stored: ascending, not empty,
    /// without overlaps. Ends after an error.
    pub(crate) fn stored<'f>(
        self,
        file: &'f File,
        range: Range<u64>,
    ) -> impl Iterator<Item = io::Result<Range<u64>>> + use<'f> {
        let mut pages = Pages {
            file,
            bitmap_at: self.bitmap_at,
            next: range.start / self.page_size,
            end: range.end.div_ceil(self.page_size),
            words: Vec::new(),
            first: 0,
        };
        let page_size = self.page_size;
        std::iter::from_fn(move || {
            let run = match pages.next_run() {
                Ok(run) => run?,
                Err(error) => {
                    pages.next = pages.end;
                    return Some(Err(error));
                }
            };
            let start = (run.start * page_size).max(range.start);
            Some(Ok(start..(run.end * page_size).min(range.end)))
        })
    }

    /// Fills `buf` with the bytes at `offset` in the block.
    pub(crate) fn read(self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        let range = offset..offset + buf.len() as u64;
        for stored in self.stored(file, range) {
            let stored = stored?;
            let into = (stored.start - offset) as usize..(stored.end - offset) as usize;
            file.read_exact_at(&mut buf[into], self.pages_at + stored.start)?;
        }
        Ok(())
    }
}

/// Finds runs of bits.
struct Pages<'f> {
    file: &'f File,
    bitmap_at: u64,
    next: u64,
    end: u64,
    /// A part of the bitmap, and the number of its first page.
    words: Vec<u8>,
    first: u64,
}

impl Pages<'_> {
    fn next_run(&mut self) -> io::Result<Option<Range<u64>>> {
        while self.next < self.end {
            self.load()?;
            let until = self.end.min(self.first + self.words.len() as u64 * 8);
            let start = self.find(self.next, until, true);
            let end = self.find(start, until, false);
            self.next = end;
            if start < end {
                return Ok(Some(start..end));
            }
        }
        Ok(None)
    }

    /// Reads the part of the bitmap that has the bit of the next page.
    fn load(&mut self) -> io::Result<()> {
        let bits = self.words.len() as u64 * 8;
        if !self.words.is_empty() && self.next < self.first + bits {
            return Ok(());
        }
        self.first = self.next & !7;
        let left = (self.end - self.first).div_ceil(8);
        self.words.resize(left.min(BITMAP_STEP) as usize, 0);
        let at = self.bitmap_at + self.first / 8;
        self.file.read_exact_at(&mut self.words, at)
    }

    /// Returns the first page from `start` on whose bit is `set`, or `until`.
    fn find(&self, start: u64, until: u64, set: bool) -> u64 {
        let skipped = if set { 0 } else { 0xff };
        let mut page = start;
        while page < until {
            let byte = self.words[((page - self.first) / 8) as usize];
            if page.is_multiple_of(8) && byte == skipped {
                page += 8;
            } else if (byte >> (page % 8) & 1 == 1) == set {
                return page;
            } else {
                page += 1;
            }
        }
        until
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_those_of_the_bits(
            bits in prop::collection::vec(any::<bool>(), 1..300),
            (a, b) in (0..300_u64 * 16, 0..300_u64 * 16),
        ) {
            let page_size = 16;
            let size = bits.len() as u64 * page_size;
            let (start, end) = (a.min(b).min(size), a.max(b).min(size));
            let file = tempfile::tempfile().unwrap();
            let mut bitmap = vec![0; bits.len().div_ceil(64) * 8];
            for (page, _) in bits.iter().enumerate().filter(|(_, set)| **set) {
                bitmap[page / 8] |= 1 << (page % 8);
            }
            file.write_all_at(&bitmap, 100).unwrap();
            file.write_all_at(&vec![7; size as usize], 1000).unwrap();
            let pages = MappedPages { bitmap_at: 100, pages_at: 1000, page_size };
            let expected: Vec<u8> = (start..end)
                .map(|at| if bits[(at / page_size) as usize] { 7 } else { 0 })
                .collect();
            let mut read = vec![1; (end - start) as usize];
            pages.read(&file, start, &mut read).unwrap();
            prop_assert_eq!(&read, &expected);
            let mut last = start;
            for stored in pages.stored(&file, start..end) {
                let stored = stored.unwrap();
                prop_assert!(last <= stored.start && stored.start < stored.end && stored.end <= end);
                last = stored.end;
            }
        }
    }

    #[test]
    fn bitmaps_longer_than_a_step_are_read_in_parts() {
        let file = tempfile::tempfile().unwrap();
        let pages = BITMAP_STEP * 8 * 2 + 10;
        file.set_len(pages / 8 + 2).unwrap();
        file.write_all_at(&[0xff; 3], BITMAP_STEP - 1).unwrap();
        let mapped = MappedPages {
            bitmap_at: 0,
            pages_at: 1 << 20,
            page_size: 4096,
        };
        let runs: Vec<_> = mapped
            .stored(&file, 0..pages * 4096)
            .map(Result::unwrap)
            .collect();
        let border = BITMAP_STEP * 8;
        let expected = [border - 8..border, border..border + 16];
        assert_eq!(runs, expected.map(|run| run.start * 4096..run.end * 4096));
        let past = mapped.stored(&file, 0..pages * 40960);
        assert!(past.last().unwrap().is_err());
    }
}
