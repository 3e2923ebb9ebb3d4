//! The footer of a snapshot, put together while its pages are written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use image_format::{
    Checksums, ChunkSum, Footer, FooterError, ImageId, Invalid, Kind, MAX_FOOTER, Placement, Run,
    Version, check_metadata,
};

use page_reader::SecretBuffer;
use sparse_file::{SpaceError, grow};

use crate::layout::{Parent, Seal};
use crate::placing::{Extent, Map};

/// Why there is no footer.
pub(crate) enum SealError {
    /// There are no random numbers.
    Id(io::Error),
    /// At this offset of the file.
    ReadBack(u64, io::Error),
    /// To this size.
    Grow(u64, SpaceError),
    Footer(FooterError),
}

impl From<Invalid> for SealError {
    fn from(invalid: Invalid) -> Self {
        Self::Footer(invalid.into())
    }
}

#[derive(Debug)]
pub(crate) struct Sealing {
    /// Everything but its runs and checksums, which are known at the end.
    footer: Footer,
    parent: Parent,
    /// Whether the region is the one that starts where the RAM does, for want of others.
    one_region: bool,
    pub(crate) map: Map,
    pub(crate) checksums: Checksums,
}

impl Sealing {
    /// For RAM that starts at the guest-physical address `ram_start`, unless the seal names its regions. Whatever would make the footer invalid is
    /// refused here, before pages are written.
    pub(crate) fn new(
        seal: Seal,
        placement: Placement,
        ram_size: u64,
        page_size: u64,
        ram_start: u64,
    ) -> Result<Self, SealError> {
        let one_region = seal.regions.is_none();
        let default = || vec![ram_start..ram_start.saturating_add(ram_size)];
        let parent = match seal.parent {
            Parent::Image(parent) => Some(parent),
            Parent::Unnamed | Parent::Raw => None,
        };
        let footer = Footer {
            version: Version::CURRENT,
            id: seal
                .id
                .map_or_else(ImageId::random, Ok)
                .map_err(SealError::Id)?,
            kind: Kind::Diff { parent },
            placement,
            ram_size,
            page_size,
            regions: seal.regions.unwrap_or_else(default),
            runs: Vec::new(),
            checksums: Vec::new(),
            metadata: seal.metadata,
        };
        footer.check_head()?;
        Ok(Self {
            map: Map::new(placement, footer.data_start()),
            footer,
            parent: seal.parent,
            one_region,
            checksums: Checksums::new(ram_size),
        })
    }

    pub(crate) fn id(&self) -> ImageId {
        self.footer.id
    }

    pub(crate) fn parent(&self) -> Parent {
        self.parent
    }

    pub(crate) fn is_full(&self) -> bool {
        self.footer.kind == Kind::Full
    }

    pub(crate) fn set_metadata(&mut self, bytes: Vec<u8>) -> Result<(), FooterError> {
        check_metadata(bytes.len() as u64)?;
        self.footer.metadata = bytes;
        Ok(())
    }

    /// The RAM starts at this guest-physical address, as the first bitmap says.
    pub(crate) fn set_ram_start(&mut self, ram_start: u64) {
        // A bitmap ends inside the address space.
        let end = ram_start.saturating_add(self.footer.ram_size);
        if self.one_region {
            self.footer.regions = vec![ram_start..end];
        }
    }

    /// Everything is about to be written, and nothing of what was counts.
    pub(crate) fn begin_full(&mut self) {
        self.footer.kind = Kind::Full;
        self.map = Map::new(self.map.placement(), self.footer.data_start());
        self.checksums = Checksums::new(self.footer.ram_size);
    }

    /// Whether the footer has room for `runs` runs of a first diff, and the sums of its first bytes.
    pub(crate) fn check_room(&self, runs: u64) -> Result<(), FooterError> {
        if self.map.extents().is_empty() {
            self.footer.planned_len(runs, u64::from(runs > 0), 0)?;
        }
        Ok(())
    }

    /// The most extents that the footer has room for. A full image has runs of zeros between them.
    pub(crate) fn most_extents(&self) -> usize {
        let most = MAX_FOOTER / 24;
        let first = self.map.extents().is_empty();
        // Less than 2^26.
        (if first && self.is_full() {
            most / 2
        } else {
            most
        }) as usize
    }

    /// What a footer of more runs than there is room for would be.
    pub(crate) fn no_room(&self) -> FooterError {
        FooterError::TooLarge {
            len: MAX_FOOTER + 24,
        }
    }

    /// Writes the footer behind the pages.
    pub(crate) fn seal(mut self, file: &File) -> Result<(), SealError> {
        self.refresh(file)?;
        let Self {
            mut footer,
            map,
            checksums,
            ..
        } = self;
        footer.checksums = checksums.finish();
        let runs = runs(map.extents(), footer.kind == Kind::Full, footer.ram_size);
        let present = map.extents().iter().map(|extent| extent.len).sum();
        let (count, sums) = (runs.clone().count() as u64, footer.checksums.len() as u64);
        let len = footer
            .planned_len(count, sums, present)
            .map_err(SealError::Footer)?;
        grow(file, len).map_err(|error| SealError::Grow(len, error))?;
        footer.write_with(file, runs).map_err(SealError::Footer)?;
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
}

/// The runs of an image with these extents, ascending. Not a list: of a large guest it would take more memory than the extents.
fn runs(extents: &[Extent], full: bool, ram_size: u64) -> impl Iterator<Item = Run> + Clone {
    let last = (ram_size..ram_size, None);
    let present = |extent: &Extent| {
        let run = Run::present(extent.guest_range(), extent.file);
        (extent.guest_range(), Some(run))
    };
    let all = extents.iter().map(present).chain([last]);
    let with_zeros = all.scan(0, move |end, (range, run)| {
        let zeros = (full && *end < range.start).then(|| Run::zeros(*end..range.start));
        *end = range.end;
        Some([zeros, run])
    });
    with_zeros.flatten().flatten()
}
