//! The header of a packed image.

use std::ops::Range;

use crate::footer::{Footer, ImageKind};
use crate::id::ImageId;
use crate::version::{MAX_RAM_SIZE, MIN_HEADER, RAW_UNIT, Version};
use crate::wire::{HEADER, MAX_FOOTER, TRAILER};

pub(crate) const HEADER_MAGIC: &[u8; 8] = b"memsnap\x01";
/// The length of the header without the zeros up to the first page, in bytes.
pub const HEADER_PAGE: usize = MIN_HEADER as usize;
/// The position of the id.
pub(crate) const ID: Range<u64> = 16..32;
/// The position of the checksum, which covers all bytes before it.
const SUM: usize = HEADER_PAGE - 32;

/// The header of a packed image. It states the length of the file, so that a file that was cut off
/// anywhere is detected.
///
/// A reader of a stream learns the length of the image from it before the rest arrives. The length
/// is unverified until the [footer](Footer::read) was read.
///
/// # Examples
/// ```
/// use image_format::{HEADER_PAGE, Header};
///
/// assert_eq!(Header::read(&[0; HEADER_PAGE]), None); // zeros are not a header
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    diff: bool,
    id: ImageId,
    /// The file offset of the first page.
    data_start: u64,
    /// The file offset of the footer.
    footer: u64,
    /// The length of the file.
    pub(crate) len: u64,
}

impl Header {
    /// Reads the header of a packed image of version 2.
    ///
    /// Returns `None` if the header is not intact, or if it states a length, a RAM size or a footer
    /// that no image can have.
    #[must_use]
    pub fn read(bytes: &[u8; HEADER_PAGE]) -> Option<Self> {
        Self::from_bytes(bytes).filter(Self::is_possible)
    }

    /// Returns `true` if an image can have this header.
    fn is_possible(&self) -> bool {
        let footer = self.len.checked_sub(self.footer);
        let pages = self.footer.checked_sub(self.data_start);
        self.data_start.is_power_of_two()
            && self.data_start >= MIN_HEADER
            && pages.is_some_and(|pages| pages <= MAX_RAM_SIZE && pages.is_multiple_of(RAW_UNIT))
            && footer.is_some_and(|len| (HEADER + TRAILER..=MAX_FOOTER + TRAILER).contains(&len))
            && !self.len.is_multiple_of(RAW_UNIT)
    }

    /// Returns `true` if the image is a diff.
    #[must_use]
    pub fn is_diff(&self) -> bool {
        self.diff
    }

    /// Returns the id of the image.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Returns the length of the complete image in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no image is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the number of present bytes.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.footer - self.data_start
    }

    /// Returns the largest page size that the image can have, in bytes. A page size of 4 KiB or
    /// more is equal to it. Smaller page sizes cannot be distinguished.
    #[must_use]
    pub fn most_page_size(&self) -> u64 {
        self.data_start
    }

    /// Returns the header of an image whose `footer` is at the offset `at` of a file of `len`
    /// bytes.
    pub(crate) fn new(footer: &Footer, at: u64, len: u64) -> Self {
        Self {
            diff: footer.kind != ImageKind::Full,
            id: footer.id,
            data_start: footer.data_start(),
            footer: at,
            len,
        }
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = HEADER_MAGIC.to_vec();
        bytes.extend(Version::V2.to_wire().to_le_bytes());
        bytes.extend([u8::from(self.diff), 0, 0, 0]);
        bytes.extend(self.id.to_bytes());
        bytes.extend(self.data_start.to_le_bytes());
        bytes.extend(self.footer.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.resize(SUM, 0);
        let sum = blake3::hash(&bytes);
        bytes.extend(sum.as_bytes());
        bytes
    }

    /// Parses a header. Returns `None` unless [`to_bytes`](Self::to_bytes) returns the same bytes.
    pub(crate) fn from_bytes(bytes: &[u8; HEADER_PAGE]) -> Option<Self> {
        let number = |at: usize| bytes[at..].first_chunk().copied().map(u64::from_le_bytes);
        let header = Self {
            diff: bytes[12] == 1,
            id: ImageId::from_bytes(*bytes[ID.start as usize..].first_chunk()?),
            data_start: number(32)?,
            footer: number(40)?,
            len: number(48)?,
        };
        (header.to_bytes() == bytes).then_some(header)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const LEN: u64 = 4096 + 8192 + HEADER + TRAILER;

    fn header() -> Header {
        Header {
            diff: true,
            id: ImageId::from_bytes([7; 16]),
            data_start: 4096,
            footer: 4096 + 8192,
            len: LEN,
        }
    }

    fn read(header: Header) -> Option<Header> {
        let bytes = header.to_bytes();
        Header::read(bytes.first_chunk().unwrap())
    }

    #[test]
    fn a_header_describes_its_image() {
        let read = read(header()).unwrap();
        assert_eq!(read, header());
        assert_eq!((read.len(), read.present_bytes()), (LEN, 8192));
        assert!(read.is_diff());
    }

    #[rstest]
    #[case::no_space_for_a_footer(|header: &mut Header| header.len -= 1)]
    #[case::footer_past_the_end(|header: &mut Header| header.footer = LEN + 1)]
    #[case::too_long_footer(|header: &mut Header| header.len += MAX_FOOTER)]
    #[case::footer_before_the_pages(|header: &mut Header| header.footer = 2048)]
    #[case::too_much_ram(|header: &mut Header| {
        header.footer = 4096 + MAX_RAM_SIZE + 512;
        header.len = header.footer + HEADER + TRAILER;
    })]
    #[case::partial_pages(|header: &mut Header| {
        header.footer = 5000;
        header.len = header.footer + HEADER + TRAILER;
    })]
    #[case::odd_page_size(|header: &mut Header| header.data_start = 4096 + 512)]
    #[case::too_short(|header: &mut Header| header.data_start = 2048)]
    #[case::a_length_of_raw_ram(|header: &mut Header| {
        header.len = (LEN + 4096).next_multiple_of(512);
    })]
    fn an_impossible_header_is_refused(#[case] change: fn(&mut Header)) {
        let mut changed = header();
        change(&mut changed);
        assert_eq!(read(changed), None);
    }

    #[test]
    fn a_flipped_bit_is_detected() {
        let mut bytes = header().to_bytes();
        bytes[33] ^= 1;
        assert_eq!(Header::read(bytes.first_chunk().unwrap()), None);
    }
}
