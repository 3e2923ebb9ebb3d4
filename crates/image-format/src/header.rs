//! The header page of a packed image.

use crate::footer::{Footer, Kind, SMALLEST_HEADER, Version};
use crate::id::ImageId;

pub(crate) const HEADER_MAGIC: &[u8; 8] = b"memsnap\x01";
/// The bytes of the header that say something; what follows up to the first page is zeros.
pub(crate) const HEADER_PAGE: usize = SMALLEST_HEADER as usize;
/// The checksum of the bytes before it.
const SUM: usize = HEADER_PAGE - 32;

/// What the start of a packed image says of the whole, so that a file that was cut off is recognised, wherever that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
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
