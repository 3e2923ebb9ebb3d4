//! What a footer says, and what makes it consistent.

use std::ops::Range;

use crate::checksums::{CHUNK_SIZE, Checksum};
use crate::error::Invalid;
use crate::id::ImageId;

/// What an image holds, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
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
    /// One after another from the start of the file on; the footer follows the last one.
    Packed,
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

    /// Where the pages end in the file and the footer begins, in bytes.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        match self.placement {
            Placement::InPlace => self.ram_size,
            Placement::Packed => self.present_bytes(),
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
        check_sizes(self.ram_size, self.page_size)?;
        self.check_regions()?;
        let mut last = 0;
        for (index, run) in self.runs.iter().enumerate() {
            check_run(index, run, last, self)?;
            last = run.start + run.len;
        }
        if self.kind == Kind::Full && last != self.ram_size {
            return Err(Invalid::NotFull { offset: last });
        }
        if self.placement == Placement::Packed {
            self.check_packed()?;
        }
        let chunks = self.present_chunks().count();
        if self.checksums.len() != chunks {
            let checksums = self.checksums.len();
            return Err(Invalid::Checksums { checksums, chunks });
        }
        if self.metadata.len() > Self::MAX_METADATA {
            let len = self.metadata.len() as u64;
            return Err(Invalid::Metadata { len });
        }
        Ok(())
    }

    fn check_regions(&self) -> Result<(), Invalid> {
        let (mut last, mut sum) = (0, 0_u64);
        for (index, region) in self.regions.iter().enumerate() {
            if region.start < last || region.end <= region.start {
                return Err(Invalid::Region { index });
            }
            last = region.end;
            // They don't overlap, so the sum is below 2^64.
            sum += region.end - region.start;
        }
        if sum == self.ram_size {
            Ok(())
        } else {
            let ram_size = self.ram_size;
            Err(Invalid::RegionsSum { sum, ram_size })
        }
    }

    /// Present runs fill the file from its start on, in any order.
    fn check_packed(&self) -> Result<(), Invalid> {
        let at = |run: &Run| match run.stored {
            Stored::At(offset) => Some((offset, run.len)),
            Stored::Zeros => None,
        };
        let mut stored: Vec<_> = self.runs.iter().filter_map(at).collect();
        stored.sort_unstable();
        let mut end = 0;
        for (offset, len) in stored {
            if offset != end {
                return Err(Invalid::Packing {
                    expected: end,
                    offset,
                });
            }
            // Runs are inside the RAM and don't overlap: below 2^63.
            end += len;
        }
        Ok(())
    }
}

/// Whether RAM can be so large, in such pages.
pub(crate) fn check_sizes(ram_size: u64, page_size: u64) -> Result<(), Invalid> {
    let fits = i64::try_from(ram_size).is_ok() && ram_size > 0;
    if fits && page_size.is_power_of_two() && ram_size.is_multiple_of(page_size) {
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
        (Stored::At(offset), Placement::Packed) if whole(offset) => Ok(()),
        (Stored::At(offset), _) => Err(Invalid::StoredAt { index, offset }),
    }
}
