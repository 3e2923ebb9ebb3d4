//! Assembles the footer of a snapshot while its pages are written.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use dirty_bitmap::{PageSet, coalesce};
use image_format::{
    CHUNK_SIZE, Checksums, ChunkSum, Extent, ExtentMap, Footer, FooterError, ImageId, ImageKind,
    InvalidFooter, Layout, MAX_FOOTER, Run, Version, WritePlan, check_metadata,
};
use page_reader::{PageReader, SecretBuffer};
use sparse_file::{SpaceError, WriteError, grow};

use crate::error::{MemoryIoStep, SnapshotError};
use crate::geometry::Geometry;
use crate::seal::{Parent, Seal};
use crate::write_pass::WritePass;

/// The length of a run in a footer, in bytes.
const RUN_LEN: u64 = 24;

/// The maximum length of a footer. The tests of this crate can reach theirs.
const MAX_LEN: u64 = if cfg!(test) {
    RUN_LEN * 1000
} else {
    MAX_FOOTER
};

/// Reasons why the footer cannot be written.
pub(crate) enum SealError {
    /// The system provided no random numbers.
    Id(io::Error),
    /// The offset in the file, and the error.
    ReadBack(u64, io::Error),
    /// The size that the file could not get, and the error.
    Grow(u64, SpaceError),
    Footer(FooterError),
}

impl SealError {
    /// Returns the error of the snapshot at `dest`.
    pub(crate) fn of_snapshot(self, dest: PathBuf) -> SnapshotError {
        match self {
            Self::Id(source) => SnapshotError::Id { dest, source },
            Self::Footer(source) => SnapshotError::Seal { dest, source },
            Self::Grow(len, error) => SnapshotError::set_size_failed(dest, len, error),
            Self::ReadBack(offset, source) => SnapshotError::MemoryIo {
                dest,
                step: MemoryIoStep::ReadBack,
                offset,
                source,
            },
        }
    }
}

/// The origin of the regions in a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Regions {
    /// One region, whose start is unknown or that of a bitmap.
    Default,
    /// One region, whose start the caller has set.
    Start,
    /// The caller or a reader.
    Known,
}

impl From<InvalidFooter> for SealError {
    fn from(invalid: InvalidFooter) -> Self {
        Self::Footer(invalid.into())
    }
}

/// The footer of a sealed or packed image that is being written.
#[derive(Debug)]
pub(crate) struct FooterBuilder {
    /// The footer without runs and checksums, which are known at the end.
    pub(crate) footer: Footer,
    parent: Parent,
    ancestors: Vec<ImageId>,
    pub(crate) regions: Regions,
    map: ExtentMap,
    /// Pages that are zeros unless the map contains them. Ascending and not overlapping.
    zeros: Vec<Range<u64>>,
    checksums: Checksums,
}

/// Returns the region of RAM without gaps. A bitmap ends inside the address space.
fn one_region(start: u64, size: u64) -> Range<u64> {
    start..start.saturating_add(size)
}

impl FooterBuilder {
    /// Creates a footer for RAM that starts at the guest-physical address `ram_start`, unless the
    /// seal lists its regions, or a [reader](Self::check_reader) does. Returns every reason that
    /// makes the footer invalid before pages are written.
    pub(crate) fn new(
        seal: Seal,
        layout: Layout,
        geometry: Geometry,
        ram_start: Option<u64>,
    ) -> Result<Self, SealError> {
        let Geometry {
            ram_size,
            page_size,
        } = geometry;
        let regions = match (&seal.regions, ram_start) {
            (Some(_), _) => Regions::Known,
            (None, Some(_)) => Regions::Start,
            (None, None) => Regions::Default,
        };
        let default = || vec![one_region(ram_start.unwrap_or(0), ram_size)];
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
            kind: ImageKind::Diff { parent },
            layout,
            ram_size,
            page_size,
            regions: seal.regions.unwrap_or_else(default),
            runs: Vec::new(),
            checksums: Vec::new(),
            metadata: seal.metadata,
        };
        footer.check_head()?;
        Ok(Self {
            map: ExtentMap::new(layout, footer.data_start()),
            zeros: Vec::new(),
            footer,
            parent: seal.parent,
            ancestors: seal.ancestors,
            regions,
            checksums: Checksums::new(ram_size),
        })
    }

    pub(crate) fn id(&self) -> ImageId {
        self.footer.id
    }

    /// Returns whether the image is a diff that needs the image `id`.
    pub(crate) fn needs(&self, id: ImageId) -> bool {
        match self.parent {
            Parent::Image(parent) => id == parent || self.ancestors.contains(&id),
            Parent::Raw => !self.is_full() && self.ancestors.contains(&id),
            Parent::Unnamed => false,
        }
    }

    pub(crate) fn parent(&self) -> Parent {
        self.parent
    }

    pub(crate) fn is_full(&self) -> bool {
        self.footer.kind == ImageKind::Full
    }

    pub(crate) fn set_metadata(&mut self, bytes: Vec<u8>) -> Result<(), FooterError> {
        check_metadata(bytes.len() as u64)?;
        self.footer.metadata = bytes;
        Ok(())
    }

    /// Sets the guest-physical start address of the RAM, taken from the first bitmap.
    pub(crate) fn set_ram_start(&mut self, ram_start: u64) {
        if self.regions != Regions::Known {
            self.footer.regions = vec![one_region(ram_start, self.footer.ram_size)];
        }
    }

    /// Prepares for a write of all of the RAM: discards all earlier writes.
    pub(crate) fn begin_full(&mut self) {
        self.footer.kind = ImageKind::Full;
        self.map = ExtentMap::new(self.map.layout(), self.footer.data_start());
        // Pages that are not in the map are zeros.
        self.zeros = vec![0..self.footer.ram_size];
        self.checksums = Checksums::new(self.footer.ram_size);
    }

    /// Returns the parts of a run of pages that are in the file.
    pub(crate) fn placed(&self, run: Range<u64>) -> Vec<Range<u64>> {
        let placed = self.map.within(&run);
        placed.map(|extent| extent.guest_range()).collect()
    }

    /// Adds runs of pages that are zeros unless the map contains them. The runs ascend and do not
    /// overlap.
    pub(crate) fn add_zeros(&mut self, runs: impl Iterator<Item = Range<u64>>) {
        let mut zeros = std::mem::take(&mut self.zeros);
        zeros.extend(runs);
        zeros.sort_unstable_by_key(|run| run.start);
        self.zeros = coalesce(zeros).collect();
    }

    /// Plans a write of pages. Checks that the footer has room for them.
    pub(crate) fn plan(&self, pages: &PageSet) -> Result<WritePlan, FooterError> {
        let count = pages.runs().count() as u64;
        self.check_room(count)?;
        let plan = self.map.plan(count, pages.runs());
        self.check_extents(&plan)?;
        Ok(plan)
    }

    /// Writes the pages of a plan. Returns the number of bytes written.
    pub(crate) fn write_plan<R: PageReader + ?Sized>(
        &mut self,
        pass: &WritePass<'_>,
        reader: &R,
        plan: WritePlan,
    ) -> Result<u64, WriteError> {
        let written = pass.write_plan(reader, &plan, &mut self.checksums)?;
        self.map.merge(plan);
        Ok(written)
    }

    /// Writes runs that are found during the write. Returns the number of bytes written, or the
    /// error of a footer that has no room for more runs.
    pub(crate) fn write_found<R: PageReader + ?Sized>(
        &mut self,
        pass: &WritePass<'_>,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<Result<u64, FooterError>, WriteError> {
        let mut plan = self.map.plan(0, []);
        let limits = (
            self.max_extents(),
            self.footer.data_start() + self.footer.ram_size,
        );
        let written = pass.write_found(reader, runs, &mut plan, &mut self.checksums, limits)?;
        let room = self.check_extents(&plan);
        self.map.merge(plan);
        Ok(room.map(|()| written))
    }

    /// Checks that the footer has room for the extents of a plan and of earlier writes.
    fn check_extents(&self, plan: &WritePlan) -> Result<(), FooterError> {
        let extents = self.map.extents().len() + plan.new_extents();
        if extents > self.max_extents() {
            return Err(FooterError::TooLarge {
                len: MAX_LEN + RUN_LEN,
            });
        }
        Ok(())
    }

    /// Checks that the footer has room for `runs` runs of a first diff, and for the checksums of
    /// its first bytes.
    pub(crate) fn check_room(&self, runs: u64) -> Result<(), FooterError> {
        if self.map.is_empty() {
            let runs = runs.saturating_add(self.zeros.len() as u64);
            self.footer.planned_len(runs, runs.min(1), 0)?;
        }
        Ok(())
    }

    /// Returns the maximum number of extents that the footer has room for. A full image has runs of
    /// zeros between them.
    fn max_extents(&self) -> usize {
        // Less than 2^26.
        let most = (MAX_LEN / RUN_LEN) as usize;
        match self.map.is_empty() && self.is_full() {
            true => most / 2,
            false => most,
        }
    }

    /// Places the pages of a file that has none and gets no others. The runs ascend; there are
    /// about `count` of them, for which memory is reserved.
    pub(crate) fn place(
        &mut self,
        count: u64,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), FooterError> {
        let mut plan = self.map.plan(count, []);
        let most = self.max_extents();
        for run in runs {
            plan.append(run);
            if plan.new_extents() > most {
                break;
            }
        }
        self.check_extents(&plan)?;
        self.map.merge(plan);
        Ok(())
    }

    /// Returns the bytes before the pages, once all pages have their [place](Self::place).
    pub(crate) fn header(&self) -> Result<Vec<u8>, FooterError> {
        let (mut chunks, mut next) = (0, 0);
        for extent in self.map.extents() {
            let range = extent.guest_range();
            let first = (range.start / CHUNK_SIZE).max(next);
            next = (range.end - 1) / CHUNK_SIZE + 1;
            chunks += next - first;
        }
        let runs = self.runs().count() as u64;
        self.footer.planned_header(runs, chunks, self.map.len())
    }

    /// Returns the number of bytes in the pages of the file.
    pub(crate) fn present_bytes(&self) -> u64 {
        self.map.len()
    }

    /// Returns the file offset after the last page.
    pub(crate) fn data_end(&self) -> u64 {
        self.footer.data_end_for(self.map.len())
    }

    /// Returns the extents of the file, and the checksums of their bytes.
    pub(crate) fn pages(&mut self) -> (&[Extent], &mut Checksums) {
        (self.map.extents(), &mut self.checksums)
    }

    /// Writes the footer to a stream, which has received the header and the pages.
    pub(crate) fn write_to(mut self, out: impl Write) -> Result<(), FooterError> {
        self.take_checksums();
        self.footer.write_runs_to(out, self.runs()).map(drop)
    }

    fn runs(&self) -> impl Iterator<Item = Run> + Clone {
        self.map.runs(&self.zeros, self.footer.ram_size)
    }

    fn take_checksums(&mut self) {
        let checksums = std::mem::replace(&mut self.checksums, Checksums::new(0));
        self.footer.checksums = checksums.finish();
    }

    /// Writes the footer after the pages.
    pub(crate) fn seal(mut self, file: &File) -> Result<(), SealError> {
        self.refresh(file)?;
        self.take_checksums();
        let (footer, runs) = (&self.footer, self.runs());
        let (count, sums) = (runs.clone().count() as u64, footer.checksums.len() as u64);
        let len = footer
            .planned_len(count, sums, self.map.len())
            .map_err(SealError::Footer)?;
        grow(file, len).map_err(|error| SealError::Grow(len, error))?;
        footer.write_with(file, runs).map_err(SealError::Footer)?;
        Ok(())
    }

    /// Computes the checksums of chunks that were written in several passes, from the file.
    fn refresh(&mut self, file: &File) -> Result<(), SealError> {
        let stale: Vec<_> = self.checksums.stale().collect();
        let mut buffer = SecretBuffer::new();
        for chunk in stale {
            let mut sum = ChunkSum::new();
            for Extent {
                file: offset, len, ..
            } in self.map.within(&chunk)
            {
                // Inside one chunk, so at most 1 MiB.
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
