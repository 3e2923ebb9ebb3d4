//! A footer from bytes that may say anything.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::checksums::Checksum;
use crate::error::{FooterError, Invalid};
use crate::footer::{Footer, Kind, Placement, Run, Stored, check_run, check_sizes};
use crate::id::ImageId;
use crate::write::{END_MAGIC, HEADER, MAGIC, NOWHERE, TRAILER, VERSION};

/// The most bytes that a footer may have without its last 64: 1 GiB, more than 40 million runs.
pub const MAX_FOOTER: u64 = 1 << 30;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;

impl Footer {
    /// Reads the footer of a sealed image.
    ///
    /// Nothing that the file says is believed before it is checked: memory is taken for no more runs than were read and found valid, and
    /// a footer that is returned passed [`check`](Self::check), and its own checksum. The pages are not looked at.
    ///
    /// # Errors
    /// [`FooterError`]; [`NotSealed`](FooterError::NotSealed) for a file without a footer.
    pub fn read(file: &File) -> Result<Self, FooterError> {
        Self::find(file)?.ok_or(FooterError::NotSealed)
    }

    /// Reads the footer of a file that may have one.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn find(file: &File) -> Result<Option<Self>, FooterError> {
        let failed = |source| io_error(0, source);
        let len = file.metadata().map_err(failed)?.len();
        Self::find_in(len, |buf, offset| file.read_exact_at(buf, offset))
    }

    /// Reads the footer of `len` bytes that `read_at` (buffer to be filled, offset) gives.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn find_in(
        len: u64,
        mut read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Option<Self>, FooterError> {
        let Some(at) = len.checked_sub(TRAILER) else {
            return Ok(None);
        };
        let mut trailer = [0; TRAILER as usize];
        read_at(&mut trailer, at).map_err(|source| io_error(at, source))?;
        if trailer[56..] != *END_MAGIC {
            return Ok(None);
        }
        let version = u32_at(&trailer, 48);
        if version != VERSION {
            return Err(FooterError::Version { version });
        }
        let (start, body) = (u64_at(&trailer, 32), u64_at(&trailer, 40));
        if start.checked_add(body) != Some(at) || body < HEADER || u32_at(&trailer, 52) != 0 {
            return Err(FooterError::Damaged {
                offset: at,
                source: None,
            });
        }
        if body > MAX_FOOTER {
            return Err(FooterError::TooLarge { len: body });
        }
        let mut body = Body {
            read_at,
            offset: start,
            left: body,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            taken: 0,
        };
        let footer = body.footer(start)?;
        if body.hasher.finalize().as_bytes()[..] != trailer[..32] {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        footer.check()?;
        let data_len = footer.data_len();
        if data_len != start {
            return Err(Invalid::Position {
                offset: start,
                data_len,
            }
            .into());
        }
        Ok(Some(footer))
    }
}

/// What the checksum of the footer is over, read piece by piece.
struct Body<R> {
    read_at: R,
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
        if self.take()? != *MAGIC || self.take()? != VERSION.to_le_bytes() {
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
        check_sizes(ram_size, page_size).map_err(|invalid| self.damaged(invalid))?;
        let (regions, runs) = (self.number()?, self.number()?);
        let (checksums, metadata) = (self.number()?, self.number()?);
        if metadata > Footer::MAX_METADATA as u64 {
            return Err(self.damaged(Invalid::Metadata { len: metadata }));
        }
        let parts = [
            Some(HEADER),
            regions.checked_mul(16),
            runs.checked_mul(24),
            checksums.checked_mul(32),
            Some(metadata),
        ];
        let sum = parts
            .into_iter()
            .try_fold(0_u64, |sum, part| sum.checked_add(part?));
        if sum != Some(len) {
            return Err(self.damaged(Invalid::Length));
        }
        let mut footer = Footer {
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
        self.runs(runs, &mut footer)?;
        for _ in 0..checksums {
            footer
                .checksums
                .push(self.take::<{ size_of::<Checksum>() }>()?);
        }
        // At most 16 MiB.
        footer.metadata.resize(metadata as usize, 0);
        self.take_into(&mut footer.metadata)?;
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

    /// Each is checked as it comes: a file that is one large hole is refused at its first run, and takes no memory.
    fn runs(&mut self, count: u64, footer: &mut Footer) -> Result<(), FooterError> {
        let mut last = 0;
        for index in 0..count as usize {
            let (start, len, stored) = (self.number()?, self.number()?, self.number()?);
            let stored = match stored {
                NOWHERE => Stored::Zeros,
                offset => Stored::At(offset),
            };
            let run = Run { start, len, stored };
            check_run(index, &run, last, footer).map_err(|invalid| self.damaged(invalid))?;
            last = start + len;
            footer.runs.push(run);
        }
        Ok(())
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
