//! What the targets share: bytes that were never a footer, sealed as if they were.

use std::io;

use image_format::{Checksums, Footer, FooterError};

/// An image whose pages are all zeros, and whose footer is any bytes, with the trailer that makes a reader believe in them.
pub struct Sealed<'a> {
    start: u64,
    body: &'a [u8],
    trailer: Vec<u8>,
}

/// Where the numbers of the header are: RAM size; number of regions, of runs.
const RAM_SIZE: usize = 48;
const REGIONS: usize = 64;
const RUNS: usize = 72;
const HEADER: usize = 96;

impl<'a> Sealed<'a> {
    /// `body` is what the trailer's checksum is over. It stands where what it says of its pages puts it.
    pub fn new(body: &'a [u8]) -> Self {
        let number = |at: usize| {
            body.get(at..)?
                .first_chunk()
                .copied()
                .map(u64::from_le_bytes)
        };
        let packed = body.get(12) == Some(&1);
        let start = if packed {
            let runs = number(REGIONS).and_then(|regions| {
                let from = HEADER.checked_add(usize::try_from(regions).ok()?.checked_mul(16)?)?;
                body.get(from..)
            });
            let runs = runs.unwrap_or_default().chunks_exact(24);
            let count = number(RUNS).map_or(0, |count| count.min(1 << 20)) as usize;
            runs.take(count)
                .filter(|run| run[16..] != [0xff; 8])
                .filter_map(|run| run[8..].first_chunk().copied().map(u64::from_le_bytes))
                .fold(0_u64, u64::wrapping_add)
        } else {
            number(RAM_SIZE).unwrap_or(0)
        };
        // So that the file's length is one.
        let start = start & (u64::MAX >> 2);
        // A chunk's sum is a hash of its bytes; a body here is shorter than one.
        let mut sum = Checksums::new(1);
        sum.feed(0, body);
        let mut trailer = sum.finish().first().copied().unwrap_or_default().to_vec();
        trailer.extend(start.to_le_bytes());
        trailer.extend((body.len() as u64).to_le_bytes());
        trailer.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        trailer.extend(b"memsnap\xff");
        Self {
            start,
            body,
            trailer,
        }
    }

    /// The length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.start + (self.body.len() + self.trailer.len()) as u64
    }

    /// Where the pages end.
    pub fn data_len(&self) -> u64 {
        self.start
    }

    /// The footer and what comes after it.
    pub fn tail(&self) -> Vec<u8> {
        [self.body, &self.trailer].concat()
    }

    /// What a reader makes of it.
    pub fn footer(&self) -> Result<Option<Footer>, FooterError> {
        let tail = self.tail();
        Footer::find_in(self.file_len(), |buf, offset| {
            for (byte, at) in buf.iter_mut().zip(offset..) {
                *byte = match at.checked_sub(self.start) {
                    None => 0,
                    Some(at) => *tail.get(at as usize).ok_or(io::ErrorKind::UnexpectedEof)?,
                };
            }
            Ok(())
        })
    }
}
