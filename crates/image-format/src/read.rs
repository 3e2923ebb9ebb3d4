//! A footer from bytes that may say anything.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checksums::Checksum;
use crate::error::{FooterError, Invalid};
use crate::footer::{
    Counted, Footer, Kind, Placement, RAW_UNIT, Run, Stored, Version, check_metadata, check_sizes,
};
use crate::header::{HEADER_MAGIC, HEADER_PAGE, Header};
use crate::id::ImageId;
use crate::write::{END_MAGIC, HEADER, MAGIC, NOWHERE, Parts, TRAILER, padding};

/// The most bytes that a footer may have without its last 64: 1 GiB, more than 40 million runs.
pub const MAX_FOOTER: u64 = 1 << 30;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

impl Footer {
    /// Reads the footer of a sealed or packed image.
    ///
    /// Nothing that the file says is believed before it is checked: memory is taken for no more runs and checksums than were read and found valid, and
    /// a footer that is returned passed [`check`](Self::check), and its own checksum. The pages are not looked at.
    ///
    /// Raw RAM is never taken for an image, whatever the guest wrote to it: its length is a multiple of [`RAW_UNIT`], which no image of version 2 has,
    /// and images of version 1 that have it are refused.
    ///
    /// # Errors
    /// [`FooterError`]: [`Truncated`](FooterError::Truncated) for a packed image that was cut off, [`Ambiguous`](FooterError::Ambiguous) for one of
    /// version 1 that may be raw RAM, [`NotSealed`](FooterError::NotSealed) for anything else that does not end in a footer.
    pub fn read(file: &File) -> Result<Self, FooterError> {
        Self::read_as(file, None)
    }

    /// Reads the footer of an image that the caller knows to be sealed or packed: also of one of version 1 that [`read`](Self::read) can't tell from raw
    /// RAM.
    ///
    /// # Errors
    /// As [`read`](Self::read), but no [`Ambiguous`](FooterError::Ambiguous); [`OtherPlacement`](FooterError::OtherPlacement) for an image of another
    /// format.
    pub fn read_as(file: &File, format: impl Into<Option<Placement>>) -> Result<Self, FooterError> {
        let failed = |source| io_error(0, source);
        let len = file.metadata().map_err(failed)?.len();
        Self::read_from(len, format, |buf, offset| file.read_exact_at(buf, offset))
    }

    /// As [`read_as`](Self::read_as), of a file of `len` bytes that `read_at` (buffer to be filled, offset) gives.
    ///
    /// # Errors
    /// As [`read_as`](Self::read_as).
    pub fn read_from(
        len: u64,
        format: impl Into<Option<Placement>>,
        mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Self, FooterError> {
        let format = format.into();
        let header = read_header(len, &mut read_at)?;
        let trailer = read_trailer(len, &mut read_at)?;
        let Some(trailer) = trailer else {
            return Err(header.refused(len));
        };
        if len.is_multiple_of(RAW_UNIT) && format.is_none() {
            // It may be raw RAM, and all of this the guest's: nothing more is read of it.
            return Err(match header {
                Start::Other => FooterError::Ambiguous { len },
                header => header.refused(len),
            });
        }
        let trailer = Trailer::new(&trailer, len)?;
        let footer = trailer.footer(read_at)?;
        if format.is_some_and(|format| format != footer.placement) {
            let found = footer.placement;
            return Err(FooterError::OtherPlacement { found });
        }
        // What stands at the start of an image in place is the guest's.
        if footer.data_start() > 0
            && header != Start::Header(Header::new(&footer, trailer.start, len))
        {
            return Err(match header {
                Start::Header(header) if header.len != len => Start::Header(header).refused(len),
                _ => damaged(0, Invalid::Header),
            });
        }
        Ok(footer)
    }
}

/// What a file begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// No packed image of version 2 begins so.
    Other,
    /// A header of which a part is missing or wrong.
    Damaged,
    Header(Header),
}

impl Start {
    /// Why a file that does not end in a footer, or may be raw, is no image.
    fn refused(self, actual: u64) -> FooterError {
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

fn read_header(
    len: u64,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<Start, FooterError> {
    let mut page = [0; HEADER_PAGE];
    let there = len.min(HEADER_PAGE as u64) as usize;
    read_at(&mut page[..there], 0).map_err(|source| io_error(0, source))?;
    if page[..8] != *HEADER_MAGIC {
        return Ok(Start::Other);
    }
    let header = Header::from_bytes(&page).filter(|_| there == HEADER_PAGE);
    Ok(header.map_or(Start::Damaged, Start::Header))
}

/// The last bytes of a file; `None` where no image ends so.
fn read_trailer(
    len: u64,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<Option<[u8; TRAILER as usize]>, FooterError> {
    let Some(at) = len.checked_sub(TRAILER) else {
        return Ok(None);
    };
    let mut bytes = [0; TRAILER as usize];
    read_at(&mut bytes, at).map_err(|source| io_error(at, source))?;
    Ok((bytes[56..] == *END_MAGIC).then_some(bytes))
}

/// What the last bytes of an image say.
struct Trailer {
    version: Version,
    checksum: [u8; 32],
    /// Where the footer begins.
    start: u64,
    /// Its length without the trailer.
    body: u64,
}

impl Trailer {
    /// That of a file of `len` bytes.
    fn new(bytes: &[u8; TRAILER as usize], len: u64) -> Result<Self, FooterError> {
        let at = len - TRAILER;
        let version = u32_at(bytes, 48);
        let version = Version::of(version).ok_or(FooterError::Version { version })?;
        let (start, body) = (u64_at(bytes, 32), u64_at(bytes, 40));
        if start.checked_add(body) != Some(at) || body < HEADER || u32_at(bytes, 52) != 0 {
            return Err(FooterError::Damaged {
                offset: at,
                source: None,
            });
        }
        if version != Version::V1 && len.is_multiple_of(RAW_UNIT) {
            return Err(damaged(at, Invalid::Padding));
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

    fn footer(
        &self,
        read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Footer, FooterError> {
        let start = self.start;
        let mut body = Body {
            read_at,
            version: self.version,
            offset: start,
            left: self.body,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            taken: 0,
        };
        let footer = body.footer(start)?;
        if body.hasher.finalize().as_bytes()[..] != self.checksum {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        footer.check()?;
        let data_end = footer.data_end();
        if data_end != start {
            return Err(Invalid::Position {
                offset: start,
                data_end,
            }
            .into());
        }
        Ok(footer)
    }
}

fn damaged(offset: u64, invalid: Invalid) -> FooterError {
    FooterError::Damaged {
        offset,
        source: Some(invalid),
    }
}

/// What the checksum of the footer is over, read piece by piece.
struct Body<R> {
    read_at: R,
    version: Version,
    /// Of the bytes that were not read yet.
    offset: u64,
    left: u64,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    taken: usize,
}

impl<R: FnMut(&mut [u8], u64) -> io::Result<()>> Body<R> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FooterError> {
        let mut bytes = [0; N];
        self.take_into(&mut bytes)?;
        Ok(bytes)
    }

    fn take_into(&mut self, mut bytes: &mut [u8]) -> Result<(), FooterError> {
        while !bytes.is_empty() {
            if self.taken == self.buffer.len() {
                self.fill()?;
            }
            let from = &self.buffer[self.taken..];
            let (now, later) = bytes.split_at_mut(from.len().min(bytes.len()));
            now.copy_from_slice(&from[..now.len()]);
            self.taken += now.len();
            bytes = later;
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<(), FooterError> {
        let len = self.left.min(BUFFER as u64);
        if len == 0 {
            return Err(self.damaged(Invalid::Length));
        }
        self.buffer.resize(len as usize, 0);
        (self.read_at)(&mut self.buffer, self.offset)
            .map_err(|source| io_error(self.offset, source))?;
        self.hasher.update(&self.buffer);
        (self.offset, self.left, self.taken) = (self.offset + len, self.left - len, 0);
        Ok(())
    }

    fn number(&mut self) -> Result<u64, FooterError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// `invalid` was found just before where this stands.
    fn damaged(&self, invalid: Invalid) -> FooterError {
        FooterError::Damaged {
            offset: self.offset - (self.buffer.len() - self.taken) as u64,
            source: Some(invalid),
        }
    }

    fn footer(&mut self, start: u64) -> Result<Footer, FooterError> {
        let len = self.left;
        if self.take()? != *MAGIC || self.take()? != self.version.number().to_le_bytes() {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        let [placement, kind, has_parent, zero] = self.take()?;
        let field = |field, value| Invalid::Field { field, value };
        let placement = match placement {
            0 => Placement::InPlace,
            1 => Placement::Packed,
            other => return Err(self.damaged(field("placement", other))),
        };
        if zero != 0 {
            return Err(self.damaged(field("reserved byte", zero)));
        }
        let id = ImageId::from_bytes(self.take()?);
        let parent: [u8; 16] = self.take()?;
        let parent = match has_parent {
            0 if parent == [0; 16] => None,
            1 => Some(ImageId::from_bytes(parent)),
            other => return Err(self.damaged(field("mark of a parent", other))),
        };
        let kind = match (kind, parent) {
            (0, None) => Kind::Full,
            (0, Some(_)) => return Err(self.damaged(Invalid::FullWithParent)),
            (1, parent) => Kind::Diff { parent },
            (other, _) => return Err(self.damaged(field("kind", other))),
        };
        let (ram_size, page_size) = (self.number()?, self.number()?);
        check_sizes(self.version, ram_size, page_size).map_err(|invalid| self.damaged(invalid))?;
        let (regions, runs) = (self.number()?, self.number()?);
        let (checksums, metadata) = (self.number()?, self.number()?);
        check_metadata(metadata).map_err(|invalid| self.damaged(invalid))?;
        let parts = Parts {
            regions,
            runs,
            checksums,
            metadata,
        };
        let padding = padding(self.version, start.saturating_add(parts.len()));
        if parts.len().checked_add(padding) != Some(len) {
            return Err(self.damaged(Invalid::Length));
        }
        let mut footer = Footer {
            version: self.version,
            id,
            kind,
            placement,
            ram_size,
            page_size,
            regions: self.regions(regions)?,
            runs: Vec::new(),
            checksums: Vec::new(),
            metadata: Vec::new(),
        };
        // As many as the chunks that the runs reach into, before memory is taken for them.
        let chunks = self.runs(runs, &mut footer)?;
        if checksums != chunks {
            return Err(self.damaged(Invalid::Checksums { checksums, chunks }));
        }
        for _ in 0..checksums {
            footer
                .checksums
                .push(self.take::<{ size_of::<Checksum>() }>()?);
        }
        while (footer.metadata.len() as u64) < metadata {
            // Piece by piece, as it is read.
            let have = footer.metadata.len();
            let more = BUFFER.min(metadata as usize - have);
            footer.metadata.resize(have + more, 0);
            self.take_into(&mut footer.metadata[have..])?;
        }
        for _ in 0..padding {
            if self.take()? != [0] {
                return Err(self.damaged(Invalid::Padding));
            }
        }
        Ok(footer)
    }

    fn regions(&mut self, count: u64) -> Result<Vec<Range<u64>>, FooterError> {
        let mut regions = Vec::<Range<u64>>::new();
        for index in 0..count as usize {
            let (start, size) = (self.number()?, self.number()?);
            let last = regions.last().map_or(0, |region| region.end);
            match start.checked_add(size) {
                Some(end) if size > 0 && start >= last => regions.push(start..end),
                _ => return Err(self.damaged(Invalid::Region { index })),
            }
        }
        Ok(regions)
    }

    /// Each is checked as it comes: a file that is one large hole is refused at its first run, and takes no memory. Returns the number of chunks
    /// that they reach into.
    fn runs(&mut self, count: u64, footer: &mut Footer) -> Result<u64, FooterError> {
        let mut counted = Counted::default();
        for _ in 0..count {
            let (start, len, stored) = (self.number()?, self.number()?, self.number()?);
            let stored = match stored {
                NOWHERE => Stored::Zeros,
                offset => Stored::At(offset),
            };
            let run = Run { start, len, stored };
            let added = counted.add(&run, footer);
            added.map_err(|invalid| self.damaged(invalid))?;
            footer.runs.push(run);
        }
        let whole = counted.check_end(footer);
        whole.map_err(|invalid| self.damaged(invalid))?;
        Ok(counted.chunks)
    }
}

fn io_error(offset: u64, source: io::Error) -> FooterError {
    FooterError::Io {
        operation: "read",
        offset,
        source,
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("four bytes"))
}
