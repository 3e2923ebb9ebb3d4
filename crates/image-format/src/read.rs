//! Parses a footer from untrusted bytes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checksums::{Checksum, ChunkSum};
use crate::error::{FooterError, Invalid};
use crate::footer::{
    Footer, Kind, Placement, RAW_UNIT, Run, RunTotals, Stored, Version, check_metadata, check_sizes,
};
use crate::header::{HEADER_MAGIC, HEADER_PAGE, Header, ID};
use crate::id::ImageId;
use crate::wire::{END_MAGIC, HEADER, MAGIC, MAX_FOOTER, PartCounts, TRAILER, ZERO_RUN, padding};

/// The number of bytes in one read.
const BUFFER: usize = 64 << 10;

impl Footer {
    /// Reads the footer of a sealed or packed image.
    ///
    /// Every field is checked before it is used. Memory is allocated only for runs and checksums
    /// that were read and found valid. A returned footer has passed [`check`](Self::check), and its
    /// own checksum matches. The pages are not read.
    ///
    /// Raw RAM is never recognized as an image, regardless of its contents. The length of raw RAM
    /// is a multiple of [`RAW_UNIT`]. Images of version 2 never have such a length, and images of
    /// version 1 with such a length are refused.
    ///
    /// If a file begins with the header of a packed image and ends with the footer of a sealed one,
    /// it is read as sealed only if the checksum of its first chunk matches. Otherwise it is a
    /// packed image that was cut off.
    ///
    /// # Errors
    /// Returns [`Truncated`](FooterError::Truncated) for a packed image that was cut off,
    /// [`Ambiguous`](FooterError::Ambiguous) for an image of version 1 that may be raw RAM, and
    /// [`NotSealed`](FooterError::NotSealed) for any other file that does not end in a footer. See
    /// [`FooterError`] for other errors.
    pub fn read(file: &File) -> Result<Self, FooterError> {
        Self::read_as(file, None)
    }

    /// Reads the footer of an image that the caller knows to be sealed or packed. This includes
    /// images of version 1 that [`read`](Self::read) cannot distinguish from raw RAM.
    ///
    /// # Errors
    /// As for [`read`](Self::read), except for [`Ambiguous`](FooterError::Ambiguous). Returns
    /// [`OtherPlacement`](FooterError::OtherPlacement) for an image of another format.
    pub fn read_as(file: &File, format: impl Into<Option<Placement>>) -> Result<Self, FooterError> {
        let failed = |source| io_error(0, source);
        let len = file.metadata().map_err(failed)?.len();
        Self::read_from(len, format, |buf, offset| file.read_exact_at(buf, offset))
    }

    /// Reads a footer like [`read_as`](Self::read_as), from a file of `len` bytes. `read_at` fills
    /// the given buffer with the bytes at the given offset.
    ///
    /// # Errors
    /// As for [`read_as`](Self::read_as).
    pub fn read_from(
        len: u64,
        format: impl Into<Option<Placement>>,
        mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Self, FooterError> {
        let format = format.into();
        let header = read_header(len, &mut read_at)?;
        let trailer = read_trailer(len, &mut read_at)?;
        let Some(trailer) = trailer else {
            return Err(header.into_error(len));
        };
        if len.is_multiple_of(RAW_UNIT) && format.is_none() {
            // The file may be raw RAM, and all of its bytes those of the guest.
            return Err(match header {
                FileStart::Other => FooterError::Ambiguous { len },
                header => header.into_error(len),
            });
        }
        let trailer = Trailer::new(&trailer, len)?;
        let footer = trailer.footer(&mut read_at)?;
        if matches!(header, FileStart::Header(_))
            && footer.placement == Placement::InPlace
            && !first_page_is_ram(&footer, &mut read_at)?
        {
            return Err(header.into_error(len));
        }
        if format.is_some_and(|format| format != footer.placement) {
            let found = footer.placement;
            return Err(FooterError::OtherPlacement { found });
        }
        // The first bytes of an image in place are those of the guest.
        if footer.data_start() > 0
            && header != FileStart::Header(Header::new(&footer, trailer.start, len))
        {
            return Err(match header {
                FileStart::Header(header) if header.len != len => {
                    FileStart::Header(header).into_error(len)
                }
                _ => damaged(0, Invalid::Header),
            });
        }
        Ok(footer)
    }
}

/// Returns whether the header of a packed image at the start of a file is RAM of the sealed image
/// that `footer` ends.
///
/// If the guest planted the footer of a sealed image, a packed image that is cut off behind it ends
/// like a sealed one. The checksum of the first chunk distinguishes them. It covers the random id
/// in the header, which was chosen after the guest wrote the footer.
fn first_page_is_ram(
    footer: &Footer,
    read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> Result<bool, FooterError> {
    let has_id = |run: &Run| run.stored != Stored::Zeros && run.range().end >= ID.end;
    let first = footer.chunks().next().filter(|chunk| chunk.number == 0);
    let Some(chunk) = first.filter(|_| footer.run_at(0).is_some_and(has_id)) else {
        return Ok(false);
    };
    let mut sum = ChunkSum::new();
    let mut buffer = vec![0; BUFFER];
    for (range, mut at) in chunk.pieces() {
        let mut left = range.end - range.start;
        while left > 0 {
            let piece = &mut buffer[..left.min(BUFFER as u64) as usize];
            read_at(piece, at).map_err(|source| io_error(at, source))?;
            sum.update(piece);
            (at, left) = (at + piece.len() as u64, left - piece.len() as u64);
        }
    }
    Ok(sum.finish() == chunk.checksum)
}

/// The beginning of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileStart {
    /// No packed image of version 2 starts like this.
    Other,
    /// A header with missing or wrong bytes.
    Damaged,
    Header(Header),
}

impl FileStart {
    /// Returns the error of a file that does not end in a footer, or may be raw.
    fn into_error(self, actual: u64) -> FooterError {
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
) -> Result<FileStart, FooterError> {
    let mut page = [0; HEADER_PAGE];
    let header_len = len.min(HEADER_PAGE as u64) as usize;
    read_at(&mut page[..header_len], 0).map_err(|source| io_error(0, source))?;
    if page[..8] != *HEADER_MAGIC {
        return Ok(FileStart::Other);
    }
    let header = Header::from_bytes(&page).filter(|_| header_len == HEADER_PAGE);
    Ok(header.map_or(FileStart::Damaged, FileStart::Header))
}

/// Returns the last bytes of a file, or `None` if no image ends like this.
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

/// The last 64 bytes of an image.
struct Trailer {
    version: Version,
    checksum: [u8; 32],
    /// The file offset of the footer.
    start: u64,
    /// The length of the footer without the trailer.
    body: u64,
}

impl Trailer {
    /// Parses the trailer of a file of `len` bytes.
    fn new(bytes: &[u8; TRAILER as usize], len: u64) -> Result<Self, FooterError> {
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
        read_at: &mut impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Footer, FooterError> {
        let start = self.start;
        let mut body = BodyReader {
            read_at,
            version: self.version,
            offset: start,
            left: self.body,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            consumed: 0,
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

/// A reader for the part of the footer that its checksum covers.
struct BodyReader<R> {
    read_at: R,
    version: Version,
    /// The file offset of the bytes that were not read yet.
    offset: u64,
    left: u64,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    consumed: usize,
}

impl<R: FnMut(&mut [u8], u64) -> io::Result<()>> BodyReader<R> {
    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], FooterError> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_exact(&mut self, mut bytes: &mut [u8]) -> Result<(), FooterError> {
        while !bytes.is_empty() {
            if self.consumed == self.buffer.len() {
                self.refill()?;
            }
            let from = &self.buffer[self.consumed..];
            let (now, later) = bytes.split_at_mut(from.len().min(bytes.len()));
            now.copy_from_slice(&from[..now.len()]);
            self.consumed += now.len();
            bytes = later;
        }
        Ok(())
    }

    fn refill(&mut self) -> Result<(), FooterError> {
        let len = self.left.min(BUFFER as u64);
        if len == 0 {
            return Err(self.damaged(Invalid::Length));
        }
        self.buffer.resize(len as usize, 0);
        (self.read_at)(&mut self.buffer, self.offset)
            .map_err(|source| io_error(self.offset, source))?;
        self.hasher.update(&self.buffer);
        (self.offset, self.left, self.consumed) = (self.offset + len, self.left - len, 0);
        Ok(())
    }

    fn read_u64(&mut self) -> Result<u64, FooterError> {
        Ok(u64::from_le_bytes(self.read_array()?))
    }

    /// Returns the error of a field that ends at the current position.
    fn damaged(&self, invalid: Invalid) -> FooterError {
        FooterError::Damaged {
            offset: self.offset - (self.buffer.len() - self.consumed) as u64,
            source: Some(invalid),
        }
    }

    fn footer(&mut self, start: u64) -> Result<Footer, FooterError> {
        let len = self.left;
        if self.read_array()? != *MAGIC
            || self.read_array()? != self.version.to_wire().to_le_bytes()
        {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        let [placement, kind, has_parent, zero] = self.read_array()?;
        let field = |field, value| Invalid::Field { field, value };
        let placement = match placement {
            0 => Placement::InPlace,
            1 => Placement::Packed,
            other => return Err(self.damaged(field("placement", other))),
        };
        if zero != 0 {
            return Err(self.damaged(field("reserved byte", zero)));
        }
        let id = ImageId::from_bytes(self.read_array()?);
        let parent: [u8; 16] = self.read_array()?;
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
        let (ram_size, page_size) = (self.read_u64()?, self.read_u64()?);
        check_sizes(self.version, ram_size, page_size).map_err(|invalid| self.damaged(invalid))?;
        let (regions, runs) = (self.read_u64()?, self.read_u64()?);
        let (checksums, metadata) = (self.read_u64()?, self.read_u64()?);
        check_metadata(metadata).map_err(|invalid| self.damaged(invalid))?;
        let parts = PartCounts {
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
        // Compared with the number of chunks before memory is allocated for the checksums.
        let chunks = self.runs(runs, &mut footer)?;
        if checksums != chunks {
            return Err(self.damaged(Invalid::Checksums { checksums, chunks }));
        }
        for _ in 0..checksums {
            footer
                .checksums
                .push(self.read_array::<{ size_of::<Checksum>() }>()?);
        }
        while (footer.metadata.len() as u64) < metadata {
            // Grown while it is read.
            let have = footer.metadata.len();
            let more = BUFFER.min(metadata as usize - have);
            footer.metadata.resize(have + more, 0);
            self.read_exact(&mut footer.metadata[have..])?;
        }
        for _ in 0..padding {
            if self.read_array()? != [0] {
                return Err(self.damaged(Invalid::Padding));
            }
        }
        Ok(footer)
    }

    fn regions(&mut self, count: u64) -> Result<Vec<Range<u64>>, FooterError> {
        let mut regions = Vec::<Range<u64>>::new();
        for index in 0..count as usize {
            let (start, size) = (self.read_u64()?, self.read_u64()?);
            let last = regions.last().map_or(0, |region| region.end);
            match start.checked_add(size) {
                Some(end) if size > 0 && start >= last => regions.push(start..end),
                _ => return Err(self.damaged(Invalid::Region { index })),
            }
        }
        Ok(regions)
    }

    /// Reads runs, and returns the number of chunks that the present ones overlap.
    ///
    /// Each run is checked immediately: a file that is one large hole is refused at its first run,
    /// without allocation.
    fn runs(&mut self, count: u64, footer: &mut Footer) -> Result<u64, FooterError> {
        let mut totals = RunTotals::default();
        for _ in 0..count {
            let (start, len, stored) = (self.read_u64()?, self.read_u64()?, self.read_u64()?);
            let stored = match stored {
                ZERO_RUN => Stored::Zeros,
                offset => Stored::At(offset),
            };
            let run = Run { start, len, stored };
            let added = totals.add(&run, footer);
            added.map_err(|invalid| self.damaged(invalid))?;
            footer.runs.push(run);
        }
        let whole = totals.check_end(footer);
        whole.map_err(|invalid| self.damaged(invalid))?;
        Ok(totals.chunks)
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
