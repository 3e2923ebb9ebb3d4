//! The start of a file, which may be the header of a packed image.

use std::io;

use zeroize::Zeroizing;

use crate::checksums::ChunkSum;
use crate::error::FooterError;
use crate::footer::Footer;
use crate::header::{HEADER_MAGIC, HEADER_PAGE, Header, ID};
use crate::run::{Run, Storage};
use crate::wire::TRAILER;

/// The number of bytes in one read.
const BUFFER: usize = 64 << 10;

/// Returns whether the header of a packed image at the start of a file is RAM of the sealed image
/// that `footer` ends.
///
/// If the guest planted the footer of a sealed image, a packed image that is cut off behind it ends
/// like a sealed one. The checksum of the first chunk distinguishes them. It covers the random id
/// in the header, which was chosen after the guest wrote the footer.
pub(super) fn first_page_is_ram(
    footer: &Footer,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<bool, FooterError> {
    let has_id = |run: &Run| run.stored != Storage::Zeros && run.range().end >= ID.end;
    let first = footer.chunks().next().filter(|chunk| chunk.number == 0);
    let Some(chunk) = first.filter(|_| footer.run_at(0).is_some_and(has_id)) else {
        return Ok(false);
    };
    let mut sum = ChunkSum::new();
    let mut buffer = Zeroizing::new(vec![0; BUFFER]);
    for (range, mut at) in chunk.pieces() {
        let mut left = range.end - range.start;
        while left > 0 {
            let piece = &mut buffer[..left.min(BUFFER as u64) as usize];
            read_at(piece, at).map_err(|source| FooterError::unreadable(at, source))?;
            sum.update(piece);
            (at, left) = (at + piece.len() as u64, left - piece.len() as u64);
        }
    }
    Ok(sum.finish() == chunk.checksum)
}

/// The beginning of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileStart {
    /// No packed image of version 2 starts like this.
    Other,
    /// A header with missing or wrong bytes.
    Damaged,
    Header(Header),
}

impl FileStart {
    /// Returns the error of a file that does not end in a footer, or may be raw.
    pub(super) fn into_error(self, actual: u64) -> FooterError {
        match self {
            Self::Other => FooterError::NotSealed,
            Self::Damaged => FooterError::Truncated {
                claimed: None,
                actual,
            },
            Self::Header(Header { len: claimed, .. }) if claimed > actual => {
                FooterError::Truncated {
                    claimed: Some(claimed),
                    actual,
                }
            }
            Self::Header(Header { len: claimed, .. }) if claimed < actual => {
                FooterError::Trailing { claimed, actual }
            }
            Self::Header(_) => FooterError::Damaged {
                offset: actual - TRAILER.min(actual),
                source: None,
            },
        }
    }
}

pub(super) fn read_header(
    len: u64,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<FileStart, FooterError> {
    // The first page of a sealed image is RAM.
    let mut page = Zeroizing::new([0; HEADER_PAGE]);
    let header_len = len.min(HEADER_PAGE as u64) as usize;
    read_at(&mut page[..header_len], 0).map_err(|source| FooterError::unreadable(0, source))?;
    if page[..8] != *HEADER_MAGIC {
        return Ok(FileStart::Other);
    }
    let header = Header::from_bytes(&page).filter(|_| header_len == HEADER_PAGE);
    Ok(header.map_or(FileStart::Damaged, FileStart::Header))
}
