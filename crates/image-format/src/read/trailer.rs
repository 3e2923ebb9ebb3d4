//! The trailer, the last 64 bytes of an image.

use std::io;

use super::body::BodyReader;
use crate::error::{FooterError, InvalidFooter};
use crate::footer::Footer;
use crate::version::{RAW_UNIT, Version};
use crate::wire::{END_MAGIC, HEADER, MAX_FOOTER, TRAILER};

/// Returns the last bytes of a file, or `None` if no image ends like this.
pub(super) fn read_trailer(
    len: u64,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<Option<[u8; TRAILER as usize]>, FooterError> {
    let Some(at) = len.checked_sub(TRAILER) else {
        return Ok(None);
    };
    let mut bytes = [0; TRAILER as usize];
    read_at(&mut bytes, at).map_err(|source| FooterError::unreadable(at, source))?;
    Ok((bytes[56..] == *END_MAGIC).then_some(bytes))
}

/// The last 64 bytes of an image.
pub(super) struct Trailer {
    version: Version,
    checksum: [u8; 32],
    /// The file offset of the footer.
    pub(super) start: u64,
    /// The length of the footer without the trailer.
    body: u64,
}

impl Trailer {
    /// Parses the trailer of a file of `len` bytes.
    pub(super) fn new(bytes: &[u8; TRAILER as usize], len: u64) -> Result<Self, FooterError> {
        let at = len - TRAILER;
        let version = u32_at(bytes, 48);
        let version = Version::from_wire(version).ok_or(FooterError::Version { version })?;
        let (start, body) = (u64_at(bytes, 32), u64_at(bytes, 40));
        if start.checked_add(body) != Some(at) || body < HEADER || u32_at(bytes, 52) != 0 {
            return Err(FooterError::Damaged {
                offset: at,
                source: None,
            });
        }
        if version != Version::V1 && len.is_multiple_of(RAW_UNIT) {
            return Err(FooterError::damaged(at, InvalidFooter::Padding));
        }
        if body > MAX_FOOTER {
            return Err(FooterError::TooLarge { len: body });
        }
        Ok(Self {
            version,
            checksum: *bytes.first_chunk().expect("64 bytes"),
            start,
            body,
        })
    }

    pub(super) fn footer(
        &self,
        read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Footer, FooterError> {
        let start = self.start;
        let mut body = BodyReader::new(read_at, self.version, start, self.body);
        let footer = body.footer(start)?;
        if body.checksum() != self.checksum {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        footer.check()?;
        let data_end = footer.data_end();
        if data_end != start {
            return Err(InvalidFooter::Position {
                offset: start,
                data_end,
            }
            .into());
        }
        Ok(footer)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("four bytes"))
}
