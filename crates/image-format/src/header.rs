//! The header page of a packed image.

use crate::footer::{Footer, Kind, MAX_RAM_SIZE, RAW_UNIT, SMALLEST_HEADER, Version};
use crate::id::ImageId;
use crate::read::MAX_FOOTER;
use crate::write::{HEADER, TRAILER};

pub(crate) const HEADER_MAGIC: &[u8; 8] = b"memsnap\x01";
/// The bytes of the header that say something; what follows up to the first page is zeros.
pub const HEADER_PAGE: usize = SMALLEST_HEADER as usize;
/// The checksum of the bytes before it.
const SUM: usize = HEADER_PAGE - 32;

/// What the start of a packed image says of the whole, so that a file that was cut off is recognised, wherever that was.
///
/// A reader of a stream learns from it how long the image is before the rest has come. It is a
/// claim until the [footer](Footer::read) was read.
///
/// # Examples
/// ```
/// use image_format::{HEADER_PAGE, Header};
///
/// assert_eq!(Header::read(&[0; HEADER_PAGE]), None); // zeros begin no packed image
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    diff: bool,
    id: ImageId,
    /// Where the first page is.
    data_start: u64,
    /// Where the footer is.
    footer: u64,
    /// The length of the file.
    pub(crate) len: u64,
}

impl Header {
    /// Reads the header of a packed image of version 2. Returns `None` for bytes that begin none:
    /// not intact, or of a length, a RAM or a footer that no image has.
    #[must_use]
    pub fn read(bytes: &[u8; HEADER_PAGE]) -> Option<Self> {
        Self::from_bytes(bytes).filter(Self::is_possible)
    }

    fn is_possible(&self) -> bool {
        let footer = self.len.checked_sub(self.footer);
        let pages = self.footer.checked_sub(self.data_start);
        self.data_start.is_power_of_two()
            && self.data_start >= SMALLEST_HEADER
            && pages.is_some_and(|pages| pages <= MAX_RAM_SIZE && pages.is_multiple_of(RAW_UNIT))
            && footer.is_some_and(|len| (HEADER + TRAILER..=MAX_FOOTER + TRAILER).contains(&len))
            && !self.len.is_multiple_of(RAW_UNIT)
    }

    /// Returns whether the image is a diff.
    #[must_use]
    pub fn is_diff(&self) -> bool {
        self.diff
    }

    /// Returns the id of the image.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Returns the length of the whole image in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no image is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns how many bytes of pages the image stores.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.footer - self.data_start
    }

    /// Returns the largest page that the image can have, in bytes. A page of 4 KiB or more is that
    /// large, smaller ones are not told from each other.
    #[must_use]
    pub fn most_page_size(&self) -> u64 {
        self.data_start
    }

    /// The header of an image that `footer` ends, at the offset `at` of a file of `len` bytes.
    pub(crate) fn new(footer: &Footer, at: u64, len: u64) -> Self {
        Self {
            diff: footer.kind != Kind::Full,
            id: footer.id,
            data_start: footer.data_start(),
            footer: at,
            len,
        }
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = HEADER_MAGIC.to_vec();
        bytes.extend(Version::V2.number().to_le_bytes());
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

    /// `None` for bytes that [`to_bytes`](Self::to_bytes) does not make.
    pub(crate) fn from_bytes(bytes: &[u8; HEADER_PAGE]) -> Option<Self> {
        let number = |at: usize| bytes[at..].first_chunk().copied().map(u64::from_le_bytes);
        let header = Self {
            diff: bytes[12] == 1,
            id: ImageId::from_bytes(*bytes[16..].first_chunk()?),
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
    fn a_header_says_what_the_image_is() {
        let read = read(header()).unwrap();
        assert_eq!(read, header());
        assert_eq!((read.len(), read.present_bytes()), (LEN, 8192));
        assert!(read.is_diff());
    }

    #[rstest]
    #[case::no_room_for_a_footer(|header: &mut Header| header.len -= 1)]
    #[case::the_footer_past_the_end(|header: &mut Header| header.footer = LEN + 1)]
    #[case::too_long_a_footer(|header: &mut Header| header.len += MAX_FOOTER)]
    #[case::the_footer_before_the_pages(|header: &mut Header| header.footer = 2048)]
    #[case::too_much_ram(|header: &mut Header| {
        header.footer = 4096 + MAX_RAM_SIZE + 512;
        header.len = header.footer + HEADER + TRAILER;
    })]
    #[case::no_whole_pages(|header: &mut Header| (header.footer, header.len) = (5000, 5000 + HEADER + TRAILER))]
    #[case::no_page_size(|header: &mut Header| header.data_start = 4096 + 512)]
    #[case::too_short(|header: &mut Header| header.data_start = 2048)]
    #[case::as_long_as_raw_ram(|header: &mut Header| header.len = (LEN + 4096).next_multiple_of(512))]
    fn what_no_image_can_be_is_refused(#[case] change: fn(&mut Header)) {
        let mut changed = header();
        change(&mut changed);
        assert_eq!(read(changed), None);
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let mut bytes = header().to_bytes();
        bytes[33] ^= 1;
        assert_eq!(Header::read(bytes.first_chunk().unwrap()), None);
    }
}
