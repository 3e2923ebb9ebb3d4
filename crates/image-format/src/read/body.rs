//! The part of the footer that its checksum covers.

use std::io;
use std::ops::Range;

use crate::check::{RunTotals, check_metadata, check_sizes};
use crate::checksums::Checksum;
use crate::error::{FooterError, InvalidFooter};
use crate::footer::{Footer, ImageKind};
use crate::id::ImageId;
use crate::layout::Layout;
use crate::run::{Run, Storage};
use crate::version::Version;
use crate::wire::{MAGIC, PartCounts, ZERO_RUN, padding};

/// The number of bytes in one read.
const BUFFER: usize = 64 << 10;

/// A reader for the part of the footer that its checksum covers.
pub(super) struct BodyReader<R> {
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
    /// Creates a reader of the `left` bytes from the file offset `offset` on.
    pub(super) fn new(read_at: R, version: Version, offset: u64, left: u64) -> Self {
        Self {
            read_at,
            version,
            offset,
            left,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            consumed: 0,
        }
    }

    /// Returns the checksum of the bytes that were read.
    pub(super) fn checksum(&self) -> Checksum {
        self.hasher.finalize().into()
    }

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
            return Err(self.damaged(InvalidFooter::Length));
        }
        self.buffer.resize(len as usize, 0);
        (self.read_at)(&mut self.buffer, self.offset)
            .map_err(|source| FooterError::unreadable(self.offset, source))?;
        self.hasher.update(&self.buffer);
        (self.offset, self.left, self.consumed) = (self.offset + len, self.left - len, 0);
        Ok(())
    }

    fn read_u64(&mut self) -> Result<u64, FooterError> {
        Ok(u64::from_le_bytes(self.read_array()?))
    }

    /// Returns the error of a field that ends at the current position.
    fn damaged(&self, invalid: InvalidFooter) -> FooterError {
        FooterError::Damaged {
            offset: self.offset - (self.buffer.len() - self.consumed) as u64,
            source: Some(invalid),
        }
    }

    pub(super) fn footer(&mut self, start: u64) -> Result<Footer, FooterError> {
        let len = self.left;
        if self.read_array()? != *MAGIC
            || self.read_array()? != self.version.to_wire().to_le_bytes()
        {
            return Err(FooterError::Damaged {
                offset: start,
                source: None,
            });
        }
        let [layout, kind, has_parent, zero] = self.read_array()?;
        let field = |field, value| InvalidFooter::Field { field, value };
        let number = layout;
        let layout = Layout::from_number(number);
        let layout = layout.ok_or_else(|| self.damaged(field("layout", number)))?;
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
            (0, None) => ImageKind::Full,
            (0, Some(_)) => return Err(self.damaged(InvalidFooter::FullWithParent)),
            (1, parent) => ImageKind::Diff { parent },
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
            return Err(self.damaged(InvalidFooter::Length));
        }
        let mut footer = Footer {
            version: self.version,
            id,
            kind,
            layout,
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
            return Err(self.damaged(InvalidFooter::Checksums { checksums, chunks }));
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
                return Err(self.damaged(InvalidFooter::Padding));
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
                _ => return Err(self.damaged(InvalidFooter::Region { index })),
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
                ZERO_RUN => Storage::Zeros,
                offset => Storage::At(offset),
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
