//! Assembles the footer of a snapshot while its pages are written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use image_format::{
    Checksums, ChunkSum, Footer, FooterError, ImageId, Invalid, Kind, MAX_FOOTER, Placement, Run,
    Version, check_metadata,
};

use page_reader::SecretBuffer;
use sparse_file::{SpaceError, grow};

use crate::layout::{Parent, Seal};
use crate::placement::{Extent, ExtentMap};

/// The maximum length of a footer. The tests of this crate can reach theirs.
const MAX_LEN: u64 = if cfg!(test) { 24 * 1000 } else { MAX_FOOTER };

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

impl From<Invalid> for SealError {
    fn from(invalid: Invalid) -> Self {
        Self::Footer(invalid.into())
    }
}

/// The footer of a sealed or packed image that is being written.
#[derive(Debug)]
pub(crate) struct FooterBuilder {
    /// The footer without runs and checksums, which are known at the end.
    footer: Footer,
    parent: Parent,
    /// Whether the footer has the default region, which begins at the start of the RAM.
    one_region: bool,
    pub(crate) map: ExtentMap,
    /// Pages that are zeros unless the map contains them. Ascending and not overlapping.
    zeros: Vec<Range<u64>>,
    pub(crate) checksums: Checksums,
}

impl FooterBuilder {
    /// Creates a footer for RAM that starts at the guest-physical address `ram_start`, unless the
    /// seal lists its regions. Returns every reason that makes the footer invalid before pages are
    /// written.
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
            map: ExtentMap::new(placement, footer.data_start()),
            zeros: Vec::new(),
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

    /// Sets the guest-physical start address of the RAM, taken from the first bitmap.
    pub(crate) fn set_ram_start(&mut self, ram_start: u64) {
        // A bitmap ends inside the address space.
        let end = ram_start.saturating_add(self.footer.ram_size);
        if self.one_region {
            self.footer.regions = vec![ram_start..end];
        }
    }

    /// Prepares for a write of all of the RAM: discards all earlier writes.
    pub(crate) fn begin_full(&mut self) {
        self.footer.kind = Kind::Full;
        self.map = ExtentMap::new(self.map.placement(), self.footer.data_start());
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
        self.zeros.extend(runs);
        self.zeros.sort_unstable_by_key(|run| run.start);
        self.zeros.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
    }

    /// Checks that the footer has room for `runs` runs of a first diff, and for the checksums of
    /// its first bytes.
    pub(crate) fn check_room(&self, runs: u64) -> Result<(), FooterError> {
        if self.map.extents().is_empty() {
            let runs = runs.saturating_add(self.zeros.len() as u64);
            self.footer.planned_len(runs, u64::from(runs > 0), 0)?;
        }
        Ok(())
    }

    /// Returns the maximum number of extents that the footer has room for. A full image has runs of
    /// zeros between them.
    pub(crate) fn max_extents(&self) -> usize {
        let most = MAX_LEN / 24;
        let first = self.map.extents().is_empty();
        // Less than 2^26.
        (if first && self.is_full() {
            most / 2
        } else {
            most
        }) as usize
    }

    /// Returns the error for more runs than the footer has room for.
    pub(crate) fn too_many_runs(&self) -> FooterError {
        FooterError::TooLarge { len: MAX_LEN + 24 }
    }

    /// Writes the footer after the pages.
    pub(crate) fn seal(mut self, file: &File) -> Result<(), SealError> {
        self.refresh(file)?;
        let Self {
            mut footer,
            map,
            zeros,
            checksums,
            ..
        } = self;
        footer.checksums = checksums.finish();
        let runs = runs(map.extents(), &zeros, footer.ram_size);
        let present = map.extents().iter().map(|extent| extent.len).sum();
        let (count, sums) = (runs.clone().count() as u64, footer.checksums.len() as u64);
        let len = footer
            .planned_len(count, sums, present)
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

/// Returns the runs of an image with these extents and with `zeros` between the extents, in
/// ascending order. Lazy: for a large guest, a list would take more memory than the extents.
fn runs<'a>(
    extents: &'a [Extent],
    zeros: &'a [Range<u64>],
    ram_size: u64,
) -> impl Iterator<Item = Run> + Clone + 'a {
    let (mut extents, mut zeros, mut at) = (extents, zeros, 0);
    std::iter::from_fn(move || {
        let end = extents.first().map_or(ram_size, |extent| extent.guest);
        while let [first, rest @ ..] = zeros
            && first.end <= at
        {
            zeros = rest;
        }
        if let Some(run) = zeros.first().filter(|run| run.start.max(at) < end) {
            let run = run.start.max(at)..run.end.min(end);
            at = run.end;
            return Some(Run::zeros(run));
        }
        let (first, rest) = extents.split_first()?;
        (extents, at) = (rest, first.guest_range().end);
        Some(Run::present(first.guest_range(), first.file))
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Extents as guest offset and length.
    #[rstest]
    #[case::none(&[], &[], &[])]
    #[case::zeros_only(&[], &[2..4], &[(2..4, false)])]
    #[case::extents_only(&[(2, 2)], &[], &[(2..4, true)])]
    #[case::all(&[(2, 2)], &[0..10], &[(0..2, false), (2..4, true), (4..10, false)])]
    #[case::extent_inside(&[(3, 1)], &[2..6], &[(2..3, false), (3..4, true), (4..6, false)])]
    #[case::extent_around(&[(1, 8)], &[2..4, 5..6], &[(1..9, true)])]
    #[case::ends_overlap(&[(2, 2), (6, 2)], &[3..7], &[(2..4, true), (4..6, false), (6..8, true)])]
    #[case::adjacent(&[(2, 2)], &[0..2, 4..5], &[(0..2, false), (2..4, true), (4..5, false)])]
    #[case::several_in_a_gap(&[(8, 1)], &[0..1, 3..4, 7..10], &[(0..1, false), (3..4, false), (7..8, false), (8..9, true), (9..10, false)])]
    fn zeros_are_listed_outside_extents(
        #[case] extents: &[(u64, u64)],
        #[case] zeros: &[Range<u64>],
        #[case] expected: &[(Range<u64>, bool)],
    ) {
        let extent = |(guest, len): &(u64, u64)| Extent {
            guest: *guest,
            file: 100 + guest,
            len: *len,
        };
        let extents: Vec<_> = extents.iter().map(extent).collect();
        let run = |(range, present): &(Range<u64>, bool)| match present {
            true => Run::present(range.clone(), 100 + range.start),
            false => Run::zeros(range.clone()),
        };
        let expected: Vec<_> = expected.iter().map(run).collect();
        assert_eq!(runs(&extents, zeros, 10).collect::<Vec<_>>(), expected);
    }
}
