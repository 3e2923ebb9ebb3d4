//! The footer of a snapshot, put together while its pages are written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use image_format::{Checksums, ChunkSum, Footer, FooterError, ImageId, Kind, Placement, Run};

use page_reader::SecretBuffer;
use sparse_file::{SpaceError, grow};

use crate::layout::Seal;
use crate::placing::{Extent, Map};

/// Why there is no footer.
pub(crate) enum SealError {
    /// At this offset of the file.
    ReadBack(u64, io::Error),
    /// To this size.
    Grow(u64, SpaceError),
    Footer(FooterError),
}

#[derive(Debug)]
pub(crate) struct Sealing {
    pub(crate) id: ImageId,
    pub(crate) metadata: Vec<u8>,
    parent: Option<ImageId>,
    regions: Option<Vec<Range<u64>>>,
    full: bool,
    ram_size: u64,
    pub(crate) map: Map,
    pub(crate) checksums: Checksums,
}

impl Sealing {
    pub(crate) fn new(seal: Seal, placement: Placement, ram_size: u64) -> io::Result<Self> {
        Ok(Self {
            id: seal.id.map_or_else(ImageId::random, Ok)?,
            metadata: seal.metadata,
            parent: seal.parent,
            regions: seal.regions,
            full: false,
            ram_size,
            map: Map::new(placement),
            checksums: Checksums::new(ram_size),
        })
    }

    pub(crate) fn parent(&self) -> Option<ImageId> {
        self.parent
    }

    /// Everything is about to be written, and nothing of what was counts.
    pub(crate) fn begin_full(&mut self) {
        self.full = true;
        self.map = Map::new(self.map.placement());
        self.checksums = Checksums::new(self.ram_size);
    }

    /// Writes the footer behind the pages.
    pub(crate) fn seal(
        mut self,
        file: &File,
        page_size: u64,
        ram_start: u64,
    ) -> Result<(), SealError> {
        self.refresh(file)?;
        let one_region = || vec![ram_start..ram_start.saturating_add(self.ram_size)];
        let footer = Footer {
            id: self.id,
            kind: match self.full {
                true => Kind::Full,
                false => Kind::Diff {
                    parent: self.parent,
                },
            },
            placement: self.map.placement(),
            ram_size: self.ram_size,
            page_size,
            runs: self.runs(),
            regions: self.regions.unwrap_or_else(one_region),
            checksums: self.checksums.finish(),
            metadata: self.metadata,
        };
        let len = footer.file_len();
        grow(file, len).map_err(|error| SealError::Grow(len, error))?;
        footer.write(file).map_err(SealError::Footer)?;
        Ok(())
    }

    /// Sums chunks that were written in several passes, from the file.
    fn refresh(&mut self, file: &File) -> Result<(), SealError> {
        let stale: Vec<_> = self.checksums.stale().collect();
        let mut buffer = SecretBuffer::new();
        for chunk in stale {
            let mut sum = ChunkSum::new();
            for Extent {
                file: offset, len, ..
            } in self.map.within(&chunk)
            {
                // Within a chunk, so no more than 1 MiB.
                let bytes = buffer.sized(len as usize);
                file.read_exact_at(bytes, offset)
                    .map_err(|error| SealError::ReadBack(offset, error))?;
                sum.update(bytes);
            }
            self.checksums.replace(chunk.start, sum.finish());
        }
        Ok(())
    }

    fn runs(&self) -> Vec<Run> {
        let extents = self.map.extents();
        let mut runs = Vec::with_capacity(extents.len());
        let mut end = 0;
        let zeros = |runs: &mut Vec<Run>, range: Range<u64>| {
            if self.full && !range.is_empty() {
                runs.push(Run::zeros(range));
            }
        };
        for extent in extents {
            zeros(&mut runs, end..extent.guest);
            runs.push(Run::present(extent.guest_range(), extent.file));
            end = extent.guest_range().end;
        }
        zeros(&mut runs, end..self.ram_size);
        runs
    }
}
