//! What a footer says, and what makes it consistent.

use std::ops::Range;

use crate::checksums::{CHUNK_SIZE, Checksum};
use crate::error::Invalid;
use crate::id::ImageId;

/// What an image holds, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The version of the format. Images are written in [`Version::CURRENT`]; older ones stay readable.
    pub version: Version,
    /// The state of the guest's RAM that the image stands for, on top of its parents if it is a diff.
    pub id: ImageId,
    /// Whether pages that are in no run are clean, and on what.
    pub kind: Kind,
    /// Where present pages are in the file.
    pub placement: Placement,
    /// The size of the guest's RAM in bytes, a multiple of the page size.
    pub ram_size: u64,
    /// The page of the image in bytes, a power of two.
    pub page_size: u64,
    /// The guest-physical address ranges of the RAM, ascending, in the order of the memory file. Their sizes add up to `ram_size`.
    pub regions: Vec<Range<u64>>,
    /// The pages that the image speaks for, ascending. In a full image, all.
    pub runs: Vec<Run>,
    /// The sums of the [chunks](CHUNK_SIZE) that have present bytes, ascending.
    pub checksums: Vec<Checksum>,
    /// Whatever the caller keeps with the image: the vCPUs' state, say. At most [`MAX_METADATA`](Self::MAX_METADATA) bytes.
    pub metadata: Vec<u8>,
}

/// A version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Version {
    /// Packed images have no header, and a file may be of any length. Where that is a multiple of 512, nothing tells the file from raw RAM
    /// that a guest wrote a footer to, and [`Footer::read`] refuses it.
    V1,
    /// Packed images begin with a header. No file's length is a multiple of 512.
    #[default]
    V2,
}

impl Version {
    /// The version that images are written in.
    pub const CURRENT: Self = Self::V2;

    pub(crate) fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }

    pub(crate) fn of(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            _ => None,
        }
    }

    /// The size of the smallest page in bytes. Raw RAM of version 2 is whole pages, so a multiple of [`RAW_UNIT`].
    fn smallest_page(self) -> u64 {
        match self {
            Self::V1 => 1,
            Self::V2 => RAW_UNIT,
        }
    }
}

/// Raw RAM is a multiple of this many bytes, 512, as a page has no less. Sealed and packed images of version 2 never are.
pub const RAW_UNIT: u64 = 512;

/// The largest RAM of an image: 4 PiB, the 52 bits of physical address that x86-64 and Armv8.2-A end at.
pub const MAX_RAM_SIZE: u64 = 1 << 52;

/// The least length of a packed image's header in bytes.
pub(crate) const SMALLEST_HEADER: u64 = 4096;

/// Whether an image is all of the RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every page is present or zero.
    Full,
    /// Pages in no run are clean: as they are in the parent.
    Diff {
        /// The id of the state that the diff was taken on top of, if the writer knew it.
        parent: Option<ImageId>,
    },
}

/// Where present pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// At their guest offsets; the footer follows the last page of the RAM.
    InPlace,
    /// One after another behind the [header](Footer::data_start); the footer follows the last one.
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

/// Pages that follow each other, with the same fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The guest offset of the first byte.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// Whether the bytes are in the file.
    pub stored: Stored,
}

/// Whether bytes are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// From this offset of the file on.
    At(u64),
    /// They are not; they read as zeros.
    Zeros,
}

impl Run {
    /// Bytes of `range` (guest offsets) that are at `offset` of the file.
    #[must_use]
    pub fn present(range: Range<u64>, offset: u64) -> Self {
        Self {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            stored: Stored::At(offset),
        }
    }

    /// Bytes of `range` (guest offsets) that are zeros.
    #[must_use]
    pub fn zeros(range: Range<u64>) -> Self {
        Self {
            stored: Stored::Zeros,
            ..Self::present(range, 0)
        }
    }

    /// The guest offsets, from the first byte to after the last. Those of a run that is not valid may be cut.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.len)
    }

    /// Where its bytes are in the file, from the guest offset `from` on, if they are.
    #[must_use]
    pub fn stored_at(&self, from: u64) -> Option<u64> {
        match self.stored {
            Stored::At(offset) => Some(offset + (from - self.start)),
            Stored::Zeros => None,
        }
    }
}

/// The present bytes of one [chunk](CHUNK_SIZE), and the sum that they must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// The chunk's number.
    pub number: u64,
    /// The guest offsets of its first byte and after its last, present or not.
    pub range: Range<u64>,
    /// The sum of its present bytes in ascending order.
    pub checksum: Checksum,
    runs: &'a [Run],
}

impl Chunk<'_> {
    /// The present bytes: their guest offsets, and where they are in the file.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<u64>, u64)> {
        self.runs.iter().filter_map(|run| {
            let range = run.range();
            let piece = range.start.max(self.range.start)..range.end.min(self.range.end);
            Some((piece.clone(), run.stored_at(piece.start)?))
        })
    }
}

impl Footer {
    /// The most bytes of metadata that a footer takes: 16 MiB.
    pub const MAX_METADATA: usize = 16 << 20;

    /// Where the pages begin in the file, in bytes: behind the header of a packed image of version 2, which is as long as a page and at least 4096
    /// bytes, and otherwise at 0.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        match (self.version, self.placement) {
            (Version::V1, _) | (_, Placement::InPlace) => 0,
            (Version::V2, Placement::Packed) => packed_start(self.page_size),
        }
    }

    /// Where the pages end in the file and the footer begins, in bytes.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        self.end_of(self.present_bytes())
    }

    pub(crate) fn end_of(&self, present: u64) -> u64 {
        match self.placement {
            Placement::InPlace => self.ram_size,
            Placement::Packed => self.data_start().saturating_add(present),
        }
    }

    /// The bytes that are in the file.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        let present = self.runs.iter().filter(|run| run.stored != Stored::Zeros);
        present.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// The bytes that are known to be zeros, and not in the file.
    #[must_use]
    pub fn zero_bytes(&self) -> u64 {
        let zeros = self.runs.iter().filter(|run| run.stored == Stored::Zeros);
        zeros.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// The parent's id, if the image is a diff that names one.
    #[must_use]
    pub fn parent(&self) -> Option<ImageId> {
        match self.kind {
            Kind::Full => None,
            Kind::Diff { parent } => parent,
        }
    }

    /// The run that speaks for the byte at the guest offset `offset`, if one does.
    #[must_use]
    pub fn run_at(&self, offset: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.start <= offset);
        let run = &self.runs[after.checked_sub(1)?];
        run.range().contains(&offset).then_some(run)
    }

    /// The first run that starts after the guest offset `offset`.
    #[must_use]
    pub fn run_after(&self, offset: u64) -> Option<&Run> {
        let after = self.runs.partition_point(|run| run.start <= offset);
        self.runs.get(after)
    }

    /// The chunks that have present bytes, ascending, each with its checksum.
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

    /// The chunks that have present bytes, with the runs that reach into each.
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

    /// Whether all that the footer says fits together: what [`write`](Self::write) and [`read`](Self::read) insist on.
    ///
    /// # Errors
    /// [`Invalid`], the first thing that doesn't fit.
    pub fn check(&self) -> Result<(), Invalid> {
        self.check_with(self.runs.iter().copied()).map(|_| ())
    }

    /// As [`check`](Self::check), of a footer with `runs` in place of its own. Returns what was counted.
    pub(crate) fn check_with(
        &self,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<Counted, Invalid> {
        self.check_head()?;
        let mut counted = Counted::default();
        for run in runs.clone() {
            counted.add(&run, self)?;
        }
        counted.check_end(self)?;
        if self.placement == Placement::Packed {
            self.check_packed(runs)?;
        }
        let (checksums, chunks) = (self.checksums.len() as u64, counted.chunks);
        if checksums != chunks {
            return Err(Invalid::Checksums { checksums, chunks });
        }
        Ok(counted)
    }

    /// Whether all but runs and checksums fits together.
    ///
    /// # Errors
    /// [`Invalid`], the first thing that doesn't fit.
    pub fn check_head(&self) -> Result<(), Invalid> {
        check_sizes(self.version, self.ram_size, self.page_size)?;
        check_regions(&self.regions, self.ram_size)?;
        check_metadata(self.metadata.len() as u64)
    }

    /// Present runs fill the file from where its pages start, in any order.
    fn check_packed(&self, runs: impl Iterator<Item = Run> + Clone) -> Result<(), Invalid> {
        let at = |run: Run| match run.stored {
            Stored::At(offset) => Some((offset, run.len)),
            Stored::Zeros => None,
        };
        let stored = runs.filter_map(at);
        // Pages of one pass are in order. Only those of several have to be sorted, which takes memory.
        if self.follow(stored.clone()).is_ok() {
            return Ok(());
        }
        let mut stored: Vec<_> = stored.collect();
        stored.sort_unstable();
        self.follow(stored)
    }

    fn follow(&self, stored: impl IntoIterator<Item = (u64, u64)>) -> Result<(), Invalid> {
        let mut end = self.data_start();
        for (offset, len) in stored {
            if offset != end {
                return Err(Invalid::Packing {
                    expected: end,
                    offset,
                });
            }
            // Runs are inside the RAM and don't overlap: below 2^53.
            end += len;
        }
        Ok(())
    }
}

/// What is known of runs that were found valid one after another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counted {
    pub(crate) runs: u64,
    /// The guest offset after the last.
    end: u64,
    pub(crate) present: u64,
    /// Chunks that have present bytes.
    pub(crate) chunks: u64,
    /// The number of the chunk after the last of those.
    next_chunk: u64,
}

impl Counted {
    pub(crate) fn add(&mut self, run: &Run, footer: &Footer) -> Result<(), Invalid> {
        // On 64-bit hosts an index is as large as a number in a file.
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

/// Where the pages of a packed image of version 2 begin in the file.
#[must_use]
pub fn packed_start(page_size: u64) -> u64 {
    SMALLEST_HEADER.max(page_size)
}

/// Whether these are the address ranges of RAM of `ram_size` bytes.
///
/// # Errors
/// [`Invalid::Region`] and [`Invalid::RegionsSum`].
pub fn check_regions(regions: &[Range<u64>], ram_size: u64) -> Result<(), Invalid> {
    let (mut last, mut sum) = (0, 0_u64);
    for (index, region) in regions.iter().enumerate() {
        if region.start < last || region.end <= region.start {
            return Err(Invalid::Region { index });
        }
        last = region.end;
        // They don't overlap, so the sum is below 2^64.
        sum += region.end - region.start;
    }
    if sum == ram_size {
        Ok(())
    } else {
        Err(Invalid::RegionsSum { sum, ram_size })
    }
}

/// Whether so many bytes of metadata fit into a footer.
///
/// # Errors
/// [`Invalid::Metadata`].
pub fn check_metadata(len: u64) -> Result<(), Invalid> {
    if len > Footer::MAX_METADATA as u64 {
        return Err(Invalid::Metadata { len });
    }
    Ok(())
}

/// Whether RAM can be so large, in such pages.
pub(crate) fn check_sizes(version: Version, ram_size: u64, page_size: u64) -> Result<(), Invalid> {
    let fits = (1..=MAX_RAM_SIZE).contains(&ram_size);
    let page = page_size.is_power_of_two() && page_size >= version.smallest_page();
    if fits && page && ram_size.is_multiple_of(page_size) {
        Ok(())
    } else {
        Err(Invalid::Sizes {
            ram_size,
            page_size,
        })
    }
}

/// Whether `run`, number `index`, may follow one that ends at `last`.
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
