//! The contents of a footer.

use std::ops::Range;

use crate::checksums::{CHUNK_SIZE, Checksum};
use crate::id::ImageId;
use crate::layout::{Layout, Placement};
use crate::run::{Run, Storage};
use crate::version::Version;

/// The footer of a sealed or packed image: its pages, identity, checksums and metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The version of the format. New images have [`Version::CURRENT`]; older versions stay
    /// readable.
    pub version: Version,
    /// The state of the guest's RAM that the image represents, for a diff on top of its parents.
    pub id: ImageId,
    /// Whether the image is full or a diff, and the parent of a diff.
    pub kind: ImageKind,
    /// The order of the pages in the file: sealed or packed.
    pub layout: Layout,
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

/// The kind of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// Every page is present or zero.
    Full,
    /// Pages in no run are clean: unchanged from the parent.
    Diff {
        /// The identifier of the state below the diff, if the writer knew it.
        parent: Option<ImageId>,
    },
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
        match self.version {
            Version::V1 => 0,
            Version::V2 => self.layout.data_start(self.page_size),
        }
    }

    /// Returns the file offset after the last page, where the footer starts.
    #[must_use]
    pub fn data_end(&self) -> u64 {
        self.data_end_for(self.present_bytes())
    }

    /// Returns the file offset after the last page of an image with `present` bytes in the file.
    /// The [`runs`](Self::runs) of the footer are not used.
    #[must_use]
    pub fn data_end_for(&self, present: u64) -> u64 {
        self.data_start()
            .saturating_add(match self.layout.placement() {
                Placement::ByOffset => self.ram_size,
                Placement::Appended => present,
            })
    }

    /// Returns the number of present bytes, those in the file.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        let present = self.runs.iter().filter(|run| run.stored != Storage::Zeros);
        present.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// Returns the number of bytes in runs of zeros.
    #[must_use]
    pub fn zero_bytes(&self) -> u64 {
        let zeros = self.runs.iter().filter(|run| run.stored == Storage::Zeros);
        zeros.fold(0, |sum, run| sum.saturating_add(run.len))
    }

    /// Returns the parent's identifier, or `None` for a full image or a diff that names no parent.
    #[must_use]
    pub fn parent(&self) -> Option<ImageId> {
        match self.kind {
            ImageKind::Full => None,
            ImageKind::Diff { parent } => parent,
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
                run.stored != Storage::Zeros && run.range().end > chunk * CHUNK_SIZE
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
}
