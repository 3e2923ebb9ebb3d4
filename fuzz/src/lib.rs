//! What the targets share: bytes that were never a footer, sealed as if they were.

use std::io;

use image_format::{Checksums, Footer, FooterError, RAW_UNIT, packed_start};

/// An image whose pages are all zeros, and whose footer is any bytes, with the header and the
/// trailer that make a reader believe in them.
pub struct Sealed<'a> {
    header: Vec<u8>,
    start: u64,
    body: &'a [u8],
    /// Padding and trailer.
    trailer: Vec<u8>,
}

/// Where the numbers at the start of a footer are: RAM size, page size; number of regions, of runs.
const RAM_SIZE: usize = 48;
const PAGE_SIZE: usize = 56;
const REGIONS: usize = 64;
const RUNS: usize = 72;
const HEADER: usize = 96;
const TRAILER: u64 = 64;

impl<'a> Sealed<'a> {
    /// `body` is what the trailer's checksum is over. It stands where what it says of its pages
    /// puts it.
    pub fn new(body: &'a [u8]) -> Self {
        let number = |at: usize| {
            body.get(at..)?
                .first_chunk()
                .copied()
                .map(u64::from_le_bytes)
        };
        let packed = body.get(12) == Some(&1);
        // Of version 2, unless it says that it is of version 1.
        let old = body.get(8..12) == Some(&[1, 0, 0, 0]);
        let data_start = match packed && !old {
            // As much as a file may have.
            true => packed_start(number(PAGE_SIZE).unwrap_or(0) & (u64::MAX >> 2)),
            false => 0,
        };
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
                .fold(data_start, u64::wrapping_add)
        } else {
            number(RAM_SIZE).unwrap_or(0)
        };
        // So that the file's length is one.
        let start = start & (u64::MAX >> 2);
        let unpadded = start + body.len() as u64 + TRAILER;
        let padding = match !old && unpadded.is_multiple_of(RAW_UNIT) {
            true => vec![0; 8],
            false => Vec::new(),
        };
        let padded = [body, &padding].concat();
        let mut trailer = padding;
        trailer.extend(hash(&padded));
        trailer.extend(start.to_le_bytes());
        trailer.extend((padded.len() as u64).to_le_bytes());
        trailer.extend([if old { 1 } else { 2 }, 0, 0, 0, 0, 0, 0, 0]);
        trailer.extend(b"memsnap\xff");
        let mut header = Vec::new();
        if data_start > 0 {
            let len = start + (body.len() + trailer.len()) as u64;
            header.extend(b"memsnap\x01");
            header.extend([2, 0, 0, 0, body.get(13).copied().unwrap_or(0), 0, 0, 0]);
            header.extend(body.get(16..32).unwrap_or(&[0; 16]));
            header.extend(data_start.to_le_bytes());
            header.extend(start.to_le_bytes());
            header.extend(len.to_le_bytes());
            header.resize(4096 - 32, 0);
            header.extend(hash(&header));
        }
        Self {
            header,
            start,
            body,
            trailer,
        }
    }

    /// What the file begins with, unless that is pages.
    pub fn header(&self) -> &[u8] {
        &self.header
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
    pub fn footer(&self) -> Result<Footer, FooterError> {
        let tail = self.tail();
        Footer::read_from(self.file_len(), None, |buf, offset| {
            for (byte, at) in buf.iter_mut().zip(offset..) {
                *byte = match at.checked_sub(self.start) {
                    None => *self.header.get(at as usize).unwrap_or(&0),
                    Some(at) => *tail.get(at as usize).ok_or(io::ErrorKind::UnexpectedEof)?,
                };
            }
            Ok(())
        })
    }
}

/// A chunk's sum is a hash of its bytes; what is hashed here is shorter than one.
fn hash(bytes: &[u8]) -> [u8; 32] {
    let mut sum = Checksums::new(1);
    sum.update(0, bytes);
    sum.finish().first().copied().unwrap_or_default()
}
