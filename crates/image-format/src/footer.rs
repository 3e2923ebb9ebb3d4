//! The contents of a footer, and their consistency.

use std::ops::Range;

use crate::checksums::{CHUNK_SIZE, Checksum};
use crate::error::Invalid;
use crate::id::ImageId;

/// The footer of a sealed or packed image: its pages, identity, checksums and metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The version of the format. New images have [`Version::CURRENT`]; older versions stay
    /// readable.
    pub version: Version,
    /// The state of the guest's RAM that the image represents, for a diff on top of its parents.
    pub id: ImageId,
    /// Whether the image is full or a diff, and the parent of a diff.
    pub kind: Kind,
    /// The location of present pages in the file.
    pub placement: Placement,
    /// The size of the guest's RAM in bytes, a multiple of the page size.
    pub ram_size: u64,
    /// The page size of the image in bytes, a power of two.
    pub page_size: u64,
    /// The guest-physical address ranges of the RAM, ascending, in the order of the memory file.
    /// Their sizes add up to `ram_size`.
    pub regions: Vec<Range<u64>>,
    /// The present and zero pages, ascending. In a full image, the runs cover all pages.
    pub runs: Vec<Run>,
    /// The checksums of the [chunks](CHUNK_SIZE) with present bytes, ascending.
    pub checksums: Vec<Checksum>,
    /// Metadata of the caller, such as vCPU state. At most [`MAX_METADATA`](Self::MAX_METADATA)
    /// bytes.
    pub metadata: Vec<u8>,
}

/// A version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Version {
    /// Packed images have no header, and a file may have any length. If the length is a multiple of
    /// 512, the file cannot be distinguished from raw RAM to which a guest wrote a footer, and
    /// [`Footer::read`] refuses it.
    V1,
    /// Packed images start with a header. The length of a file is never a multiple of 512.
    #[default]
    V2,
}

impl Version {
    /// The version in which images are written.
    pub const CURRENT: Self = Self::V2;

    pub(crate) fn to_wire(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }

    pub(crate) fn from_wire(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            _ => None,
        }
    }

    /// Returns the smallest page size in bytes. In version 2 it makes the length of raw RAM a
    /// multiple of [`RAW_UNIT`].
    fn min_page_size(self) -> u64 {
        match self {
            Self::V1 => 1,
            Self::V2 => RAW_UNIT,
        }
    }
}

/// The unit of the length of raw RAM in bytes: 512, the smallest page size.
///
/// The length of raw RAM is a multiple of this unit. The length of a sealed or packed image of
/// version 2 never is.
pub const RAW_UNIT: u64 = 512;

/// The largest RAM size of an image: 4 PiB, the limit of the 52-bit physical addresses of x86-64
/// and Armv8.2-A.
pub const MAX_RAM_SIZE: u64 = 1 << 52;

/// The minimum length of a packed image's header in bytes.
pub(crate) const MIN_HEADER: u64 = 4096;

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every page is present or zero.
    Full,
    /// Pages in no run are clean: unchanged from the parent.
    Diff {
        /// The identifier of the state below the diff, if the writer knew it.
        parent: Option<ImageId>,
    },
}

/// The location of present pages in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// At their guest offsets. The footer follows the last page of the RAM.
    InPlace,
    /// One after another, after the [header](Footer::data_start). The footer follows the last
    /// present page.
    Packed,
}

impl Placement {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::InPlace => "sealed",
            Self::Packed => "packed",
        }
    }
}

/// Consecutive pages with the same storage state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The guest offset of the first byte.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// The location of the bytes.
    pub stored: Stored,
}

/// The location of the bytes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// In the file, at this offset.
    At(u64),
    /// Not in the file. They read as zeros.
    Zeros,
}

impl Run {
    /// Creates a run of the guest offsets `range` whose bytes are at `offset` of the file.
    #[must_use]
    pub fn present(range: Range<u64>, offset: u64) -> Self {
        Self {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            stored: Stored::At(offset),
        }
    }

    /// Creates a run of the guest offsets `range` whose bytes are zeros.
    #[must_use]
    pub fn zeros(range: Range<u64>) -> Self {
        Self {
            stored: Stored::Zeros,
            ..Self::present(range, 0)
        }
    }

    /// Returns the guest offsets of the run. The end of an invalid run saturates.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.len)
    }

    /// Returns the file offset of the byte at the guest offset `from`, or `None` if the run is
    /// zeros.
    #[must_use]
    pub fn stored_at(&self, from: u64) -> Option<u64> {
        match self.stored {
            Stored::At(offset) => Some(offset + (from - self.start)),
            Stored::Zeros => None,
        }
    }
}

/// A [chunk](CHUNK_SIZE) with present bytes, and their checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// The number of the chunk.
    pub number: u64,
    /// The guest offsets of the whole chunk, including bytes that are not present.
    pub range: Range<u64>,
    /// The checksum of the present bytes in ascending order.
    pub checksum: Checksum,
    runs: &'a [Run],
}

impl Chunk<'_> {
    /// Returns the present bytes: their guest offsets, and their offset in the file.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<u64>, u64)> {
        self.runs.iter().filter_map(|run| {
            let range = run.range();
            let piece = range.start.max(self.range.start)..range.end.min(self.range.end);
            Some((piece.clone(), run.stored_at(piece.start)?))
        })
    }
}

impl Footer {
    /// The maximum length of metadata in bytes: 16 MiB.
    pub const MAX_METADATA: usize = 16 << 20;

    /// Returns the file offset of the first page. In a packed image of version 2, it is the length
    /// of the header: that of a page, at least 4096 bytes. Otherwise it is 0.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        match (self.version, self.placement) {
            (Version::V1, _) | (_, Placement::InPlace) => 0,
            (Version::V2, Placement::Packed) => packed_start(self.page_size),
        }
    }

    /// Returns the file offset after the last page, where the footer starts.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        self.data_end_for(self.present_bytes())
    }

    pub(crate) fn data_end_for(&self, present: u64) -> u64 {
        match self.placement {
            Placement::InPlace => self.ram_size,
            Placement::Packed => self.data_start().saturating_add(present),
        }
    }

    /// Returns the number of present bytes, those in the file.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        let present = self.runs.iter().filter(|run| run.stored != Stored::Zeros);
        present.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// Returns the number of bytes in runs of zeros.
    #[must_use]
    pub fn zero_bytes(&self) -> u64 {
        let zeros = self.runs.iter().filter(|run| run.stored == Stored::Zeros);
        zeros.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// Returns the parent's identifier, or `None` for a full image or a diff that names no parent.
    #[must_use]
    pub fn parent(&self) -> Option<ImageId> {
        match self.kind {
            Kind::Full => None,
            Kind::Diff { parent } => parent,
        }
    }

    /// Returns the run that includes the guest offset `offset`.
    #[must_use]
    pub fn run_at(&self, offset: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.start <= offset);
        let run = &self.runs[after.checked_sub(1)?];
        run.range().contains(&offset).then_some(run)
    }

    /// Returns the first run that starts after the guest offset `offset`.
    #[must_use]
    pub fn run_after(&self, offset: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.start <= offset);
        self.runs.get(after)
    }

    /// Returns the chunks with present bytes and their checksums, ascending.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        let mut sums = self.checksums.iter();
        self.present_chunks().map_while(move |(number, runs)| {
            Some(Chunk {
                number,
                range: number * CHUNK_SIZE..self.ram_size.min((number + 1) * CHUNK_SIZE),
                checksum: *sums.next()?,
                runs,
            })
        })
    }

    /// Returns the numbers of the chunks with present bytes, each with the runs that overlap it.
    fn present_chunks(&self) -> impl Iterator<Item = (u64, &[Run])> {
        let (mut runs, mut chunk) = (&self.runs[..], 0);
        std::iter::from_fn(move || {
            let next = runs.iter().position(|run| {
                run.stored != Stored::Zeros && run.range().end > chunk * CHUNK_SIZE
            })?;
            runs = &runs[next..];
            chunk = chunk.max(runs[0].start / CHUNK_SIZE);
            let end = (chunk + 1) * CHUNK_SIZE;
            let reach = runs.iter().take_while(|run| run.start < end).count();
            let found = (chunk, &runs[..reach]);
            chunk += 1;
            Some(found)
        })
    }

    /// Checks that the footer is consistent, as [`write`](Self::write) and [`read`](Self::read)
    /// require.
    ///
    /// # Errors
    /// Returns the first inconsistency as [`Invalid`].
    pub fn check(&self) -> Result<(), Invalid> {
        self.check_with(self.runs.iter().copied()).map(|_| ())
    }

    /// Checks the footer with `runs` in place of its own, and returns their totals.
    pub(crate) fn check_with(
        &self,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<RunTotals, Invalid> {
        self.check_head()?;
        let mut totals = RunTotals::default();
        for run in runs.clone() {
            totals.add(&run, self)?;
        }
        totals.check_end(self)?;
        if self.placement == Placement::Packed {
            self.check_packed(runs)?;
        }
        let (checksums, chunks) = (self.checksums.len() as u64, totals.chunks);
        if checksums != chunks {
            return Err(Invalid::Checksums { checksums, chunks });
        }
        Ok(totals)
    }

    /// Checks everything except runs and checksums.
    ///
    /// # Errors
    /// Returns the first inconsistency as [`Invalid`].
    pub fn check_head(&self) -> Result<(), Invalid> {
        check_sizes(self.version, self.ram_size, self.page_size)?;
        check_regions(&self.regions, self.ram_size)?;
        check_metadata(self.metadata.len() as u64)
    }

    /// Checks that present runs fill the file from [`data_start`](Self::data_start), in any order.
    fn check_packed(&self, runs: impl Iterator<Item = Run> + Clone) -> Result<(), Invalid> {
        let at = |run: Run| match run.stored {
            Stored::At(offset) => Some((offset, run.len)),
            Stored::Zeros => None,
        };
        let stored = runs.filter_map(at);
        // Pages of one pass are in order. Those of several passes are sorted, which takes memory.
        if self.check_contiguous(stored.clone()).is_ok() {
            return Ok(());
        }
        let mut stored: Vec<_> = stored.collect();
        stored.sort_unstable();
        self.check_contiguous(stored)
    }

    fn check_contiguous(
        &self,
        stored: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), Invalid> {
        let mut end = self.data_start();
        for (offset, len) in stored {
            if offset != end {
                return Err(Invalid::Packing {
                    expected: end,
                    offset,
                });
            }
            // Runs are inside the RAM and do not overlap, so the sum is below 2^53.
            end += len;
        }
        Ok(())
    }
}

/// Totals of valid runs, added one after another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RunTotals {
    pub(crate) runs: u64,
    /// The guest offset after the last run.
    end: u64,
    pub(crate) present: u64,
    /// The number of chunks with present bytes.
    pub(crate) chunks: u64,
    /// The number of the chunk after the last chunk with present bytes.
    next_chunk: u64,
}

impl RunTotals {
    pub(crate) fn add(&mut self, run: &Run, footer: &Footer) -> Result<(), Invalid> {
        // On 64-bit hosts, an index can hold every number of a file.
        check_run(self.runs as usize, run, self.end, footer)?;
        self.runs += 1;
        self.end = run.start + run.len;
        if run.stored != Stored::Zeros {
            self.present += run.len;
            let first = (run.start / CHUNK_SIZE).max(self.next_chunk);
            self.next_chunk = (self.end - 1) / CHUNK_SIZE + 1;
            self.chunks += self.next_chunk - first;
        }
        Ok(())
    }

    pub(crate) fn check_end(&self, footer: &Footer) -> Result<(), Invalid> {
        match footer.kind {
            Kind::Full if self.end != footer.ram_size => Err(Invalid::NotFull { offset: self.end }),
            _ => Ok(()),
        }
    }
}

/// Returns the file offset of the first page in a packed image of version 2.
#[must_use]
pub fn packed_start(page_size: u64) -> u64 {
    MIN_HEADER.max(page_size)
}

/// Checks that `regions` are the address ranges of RAM of `ram_size` bytes.
///
/// # Errors
/// Returns [`Invalid::Region`] or [`Invalid::RegionsSum`].
pub fn check_regions(regions: &[Range<u64>], ram_size: u64) -> Result<(), Invalid> {
    let (mut last, mut sum) = (0, 0_u64);
    for (index, region) in regions.iter().enumerate() {
        if region.start < last || region.end <= region.start {
            return Err(Invalid::Region { index });
        }
        last = region.end;
        // Regions do not overlap, so the sum is below 2^64.
        sum += region.end - region.start;
    }
    if sum == ram_size {
        Ok(())
    } else {
        Err(Invalid::RegionsSum { sum, ram_size })
    }
}

/// Checks that metadata of `len` bytes fits into a footer.
///
/// # Errors
/// Returns [`Invalid::Metadata`].
pub fn check_metadata(len: u64) -> Result<(), Invalid> {
    if len > Footer::MAX_METADATA as u64 {
        return Err(Invalid::Metadata { len });
    }
    Ok(())
}

/// Checks the size of RAM and pages.
pub(crate) fn check_sizes(version: Version, ram_size: u64, page_size: u64) -> Result<(), Invalid> {
    let fits = (1..=MAX_RAM_SIZE).contains(&ram_size);
    let page = page_size.is_power_of_two() && page_size >= version.min_page_size();
    if fits && page && ram_size.is_multiple_of(page_size) {
        Ok(())
    } else {
        Err(Invalid::Sizes {
            ram_size,
            page_size,
        })
    }
}

/// Checks that `run`, with the number `index`, may follow a run that ends at `last`.
pub(crate) fn check_run(
    index: usize,
    run: &Run,
    last: u64,
    footer: &Footer,
) -> Result<(), Invalid> {
    let in_ram = run
        .start
        .checked_add(run.len)
        .is_some_and(|end| end <= footer.ram_size);
    let whole = |bytes: u64| bytes.is_multiple_of(footer.page_size);
    if run.len == 0 || !in_ram || !whole(run.start) || !whole(run.len) {
        return Err(Invalid::Run { index });
    }
    if run.start < last || footer.kind == Kind::Full && run.start != last {
        return Err(Invalid::Order { index });
    }
    match (run.stored, footer.placement) {
        (Stored::Zeros, _) => Ok(()),
        (Stored::At(offset), Placement::InPlace) if offset == run.start => Ok(()),
        (Stored::At(offset), Placement::Packed)
            if whole(offset) && offset >= footer.data_start() =>
        {
            Ok(())
        }
        (Stored::At(offset), _) => Err(Invalid::StoredAt { index, offset }),
    }
}
