//! The file that the probe writes and examines.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::unistd::fsync;

use super::behavior::{Punch, SeekHole, WrittenZeros};
use crate::extents::{Extent, ExtentKind, ExtentSource, reported_extents};
use crate::space::{SpaceError, allocated_bytes, grow, punch_hole};

/// The sample of this system.
pub(super) const HERE: Layout = if cfg!(target_os = "macos") {
    Layout::MACOS
} else {
    Layout::LINUX
};
/// The block of noise only: the single byte may be stored with the metadata.
pub(super) const WRITTEN: u64 = 64 << 10;
/// Gaps like those between the pages of a diff, with data of their size before and after each. A
/// file system may keep large gaps and store small ones as zeros.
const GAPS: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];
const STEPS: u64 = 4;

/// Where the parts of a sample are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub len: u64,
}

impl Layout {
    pub(super) const LINUX: Self = Self { len: 16 << 20 };
    /// APFS stores gaps as data up to about 16 MiB, so gaps of a quarter of this show whether it
    /// keeps any.
    pub(super) const MACOS: Self = Self { len: 128 << 20 };

    pub(super) const fn half(self) -> u64 {
        self.len / 2
    }

    /// Returns the range of the noise, at a multiple of every block size in use.
    pub(super) const fn noise(self) -> Range<u64> {
        self.half()..self.half() + WRITTEN
    }

    const fn byte_at(self) -> u64 {
        self.len / 4 * 3
    }

    /// Returns the range of written zeros, in blocks of their own.
    const fn zeros(self) -> Range<u64> {
        self.half() / 2..self.half() / 2 + (64 << 10)
    }

    /// Returns the upper bound of the gaps of the sample between other data.
    const fn large_gap(self) -> u64 {
        self.len / 4
    }

    /// Returns the data ranges between gaps of `gap` bytes: at multiples of `gap`, and farther than
    /// that from all other data.
    fn ladder(self, gap: u64) -> impl Iterator<Item = Range<u64>> {
        // Away from the single byte, whose extent shows the block size of the file system.
        let start = self.len / 16 + 16 * gap;
        (0..STEPS).map(move |step| start + 2 * step * gap..start + (2 * step + 1) * gap)
    }

    /// Derives from the listed data whether the reports are reliable, and how fine they are.
    fn seek_hole(self, data: &[Range<u64>]) -> SeekHole {
        let holding = |wanted: Range<u64>| {
            data.iter()
                .find(|data| data.start <= wanted.start && data.end >= wanted.end)
        };
        let byte = self.byte_at()..self.byte_at() + 1;
        match (holding(self.noise()), holding(byte)) {
            (Some(_), Some(byte))
                if GAPS
                    .into_iter()
                    .flat_map(|gap| self.ladder(gap))
                    .all(|step| holding(step).is_some()) =>
            {
                let kept = |gap: u64| self.ladder(gap).all(|step| data.contains(&step));
                let finest = GAPS.into_iter().rev().take_while(|gap| kept(*gap)).last();
                let finest = finest.or_else(|| kept_block(data));
                SeekHole::Exact {
                    granularity: finest
                        .unwrap_or(self.large_gap())
                        .max(byte.end - byte.start),
                }
            }
            _ => SeekHole::Unreliable,
        }
    }
}

/// A synced sparse file that contains a block of noise, a block of zeros and a single byte.
#[derive(Debug)]
pub(super) struct Sample<'f> {
    file: &'f File,
    layout: Layout,
}

impl<'f> Sample<'f> {
    pub(super) fn write(file: &'f File, layout: Layout) -> io::Result<Self> {
        grow(file, layout.len).map_err(into_io)?;
        // Inside RLIMIT_FSIZE, because `grow` was.
        file.write_all_at(&noise(), layout.noise().start)?;
        file.write_all_at(&[1], layout.byte_at())?;
        let zeros = layout.zeros();
        file.write_all_at(&vec![0; (zeros.end - zeros.start) as usize], zeros.start)?;
        for gap in GAPS {
            let data = vec![1; gap as usize];
            for step in layout.ladder(gap) {
                file.write_all_at(&data, step.start)?;
            }
        }
        // Delayed allocation counts blocks only after a sync. Not std's sync: the drive need not be
        // flushed.
        fsync(file)?;
        Ok(Self { file, layout })
    }

    pub(super) fn allocated(&self) -> io::Result<u64> {
        allocated_bytes(self.file)
    }

    pub(super) fn preferred_block_size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blksize())
    }

    pub(super) fn seek_hole(&self) -> io::Result<SeekHole> {
        let mut listing = reported_extents(self.file)?;
        match listing.source() {
            ExtentSource::Unsupported | ExtentSource::NotUsed => return Ok(SeekHole::Unsupported),
            ExtentSource::NoHoleReported => return Ok(SeekHole::AllData),
            ExtentSource::Reported | ExtentSource::CutShort => {}
        }
        let mut data = Vec::new();
        for extent in listing.by_ref() {
            let extent = extent?;
            if extent.kind == ExtentKind::Data {
                data.push(extent.range);
            }
        }
        Ok(self.layout.seek_hole(&data))
    }

    /// Returns whether written zeros are listed as data, if `seek_hole` is reliable.
    pub(super) fn written_zeros(&self, seek_hole: SeekHole) -> io::Result<WrittenZeros> {
        if !matches!(seek_hole, SeekHole::Exact { .. }) {
            return Ok(WrittenZeros::Unknown);
        }
        let zeros = self.layout.zeros();
        for extent in reported_extents(self.file)? {
            let Extent { range, kind } = extent?;
            if kind == ExtentKind::Hole && range.start < zeros.end && zeros.start < range.end {
                return Ok(WrittenZeros::Hole);
            }
        }
        Ok(WrittenZeros::Data)
    }

    /// Punches the noise out. The sample cannot be used afterwards.
    pub(super) fn punch(&mut self) -> io::Result<Punch> {
        fsync(self.file)?;
        let before = self.allocated()?;
        match punch_hole(self.file, self.layout.noise()) {
            Ok(()) => {}
            Err(SpaceError::Unsupported { .. }) => return Ok(Punch::Unsupported),
            // Drivers return different errors for an unsupported mode.
            Err(SpaceError::Io { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(Punch::Unsupported);
            }
            Err(error) => return Err(into_io(error)),
        }
        let mut bytes = noise();
        self.file
            .read_exact_at(&mut bytes, self.layout.noise().start)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(Punch::Unsupported);
        }
        fsync(self.file)?;
        let freed = before.saturating_sub(self.allocated()?) >= WRITTEN;
        Ok(if freed { Punch::Frees } else { Punch::Zeroes })
    }
}

/// Returns the size of the smallest hole between the data, if every range consists of aligned
/// blocks of this size: the file system stores data in such blocks, such as huge pages of tmpfs.
fn kept_block(data: &[Range<u64>]) -> Option<u64> {
    let holes = data.windows(2).map(|pair| pair[1].start - pair[0].end);
    let block = holes.min().filter(|hole| hole.is_power_of_two())?;
    let aligned = |range: &Range<u64>| (range.start | range.end).is_multiple_of(block);
    data.iter().all(aligned).then_some(block)
}

/// Returns bytes that no file system compresses or stores as a hole, from a xorshift generator
/// (Marsaglia 2003).
pub(super) fn noise() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let words = (0..WRITTEN / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    });
    words.collect()
}

fn into_io(error: SpaceError) -> io::Error {
    match error {
        SpaceError::Io { source, .. } => source,
        error => io::Error::other(error),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::probe::HoleSupport;

    const EXACT: SeekHole = SeekHole::Exact { granularity: 4096 };

    #[test]
    fn block_is_the_smallest_hole_if_all_data_is_aligned() {
        const M: u64 = 1 << 20;
        assert_eq!(
            kept_block(&[0..6 * M, 8 * M..10 * M, 12 * M..14 * M]),
            Some(2 * M)
        );
        assert_eq!(kept_block(&[0..6 * M, 8 * M..9 * M, 11 * M..14 * M]), None);
        assert_eq!(kept_block(&[0..5 * M, 8 * M..10 * M]), None);
        assert_eq!(kept_block(&[0..16 * M]), None);
    }

    /// As on ZFS with compression: no block of zeros is stored.
    #[test]
    fn file_system_that_stores_no_zeros_is_detected() {
        let file = tempfile::tempfile().expect("a file");
        let sample = Sample::write(&file, Layout::LINUX).expect("written");
        assert_eq!(
            sample.written_zeros(EXACT).expect("listed"),
            WrittenZeros::Data
        );
        let zeros = Layout::LINUX.zeros();
        let blocks = zeros.start + 16384..zeros.start + 32768;
        punch_hole(&file, blocks).expect("punched");
        assert_eq!(sample.seek_hole().expect("listed"), EXACT);
        assert_eq!(
            sample.written_zeros(EXACT).expect("listed"),
            WrittenZeros::Hole
        );
        assert_eq!(
            sample
                .written_zeros(SeekHole::AllData)
                .expect("nothing to list"),
            WrittenZeros::Unknown
        );
    }

    /// Returns what APFS lists as data: gaps up to 16 MiB are stored, larger ones are holes, and
    /// blocks have 4 KiB.
    fn data_on_apfs(layout: Layout) -> Vec<Range<u64>> {
        let byte = layout.byte_at()..layout.byte_at() + 4096;
        let ladders = GAPS.into_iter().flat_map(|gap| layout.ladder(gap));
        let mut written: Vec<_> = ladders
            .chain([layout.noise(), layout.zeros(), byte])
            .collect();
        written.sort_by_key(|range| range.start);
        let mut data = vec![0..0];
        for range in written.into_iter().chain([layout.len..layout.len]) {
            let last = data.last_mut().expect("one at least");
            if range.start - last.end <= 16 << 20 {
                last.end = range.end;
            } else {
                data.push(range);
            }
        }
        data.retain(|range| !range.is_empty());
        data
    }

    #[test]
    fn apfs_keeps_holes_in_a_sample_of_macos_only() {
        let judge = |layout: Layout| {
            let data = data_on_apfs(layout);
            let allocated = data.iter().map(|range| range.end - range.start).sum();
            let seek_hole = match &data[..] {
                [all] if *all == (0..layout.len) => SeekHole::AllData,
                data => layout.seek_hole(data),
            };
            (
                seek_hole,
                HoleSupport::from_evidence(layout, seek_hole, allocated),
            )
        };
        // Gaps of up to 32 MiB are not holes in it, but larger ones are.
        let exact = SeekHole::Exact {
            granularity: 32 << 20,
        };
        assert_eq!(judge(Layout::MACOS), (exact, HoleSupport::Sparse));
        assert_eq!(
            judge(Layout::LINUX),
            (SeekHole::AllData, HoleSupport::Dense)
        );
    }

    #[test]
    fn a_sample_of_macos_is_sparse_on_a_sparse_file_system() {
        let file = tempfile::tempfile().expect("a file");
        let sample = Sample::write(&file, Layout::MACOS).expect("written");
        assert_eq!(sample.seek_hole().expect("listed"), EXACT);
        let allocated = sample.allocated().expect("allocated");
        for seek_hole in [EXACT, SeekHole::AllData] {
            let support = HoleSupport::from_evidence(Layout::MACOS, seek_hole, allocated);
            assert_eq!(support, HoleSupport::Sparse, "{allocated}");
        }
    }
}
