//! The file that the probe writes and examines.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::unistd::fsync;

use super::behavior::{Punch, SeekHole, WrittenZeros};
use crate::extents::{Extent, ExtentKind, ExtentSource, reported_extents};
use crate::space::{SpaceError, allocated_bytes, grow, punch_hole};

/// APFS stores gaps as data up to about 16 MiB, so gaps of a quarter of this show whether it keeps
/// any.
pub(super) const LEN: u64 = if cfg!(target_os = "macos") {
    128 << 20
} else {
    16 << 20
};
pub(super) const HALF: u64 = LEN / 2;
/// The block of noise only: the single byte may be stored with the metadata.
pub(super) const WRITTEN: u64 = 64 << 10;
/// The range of the noise, at a multiple of every block size in use.
pub(super) const NOISE: Range<u64> = HALF..HALF + WRITTEN;
const BYTE_AT: u64 = LEN / 4 * 3;
/// The range of written zeros, in blocks of their own.
const ZEROS: Range<u64> = HALF / 2..HALF / 2 + (64 << 10);
/// Gaps like those between the pages of a diff, with data of their size before and after each. A
/// file system may keep large gaps and store small ones as zeros.
const GAPS: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];
const STEPS: u64 = 4;
/// Away from the single byte, whose extent shows the block size of the file system.
const LADDERS_AT: u64 = LEN / 16;
/// Upper bound of the gaps of the sample between other data.
const LARGE_GAP: u64 = LEN / 4;

/// A synced sparse file that contains a block of noise, a block of zeros and a single byte.
#[derive(Debug)]
pub(super) struct Sample<'f> {
    file: &'f File,
}

impl<'f> Sample<'f> {
    pub(super) fn write(file: &'f File) -> io::Result<Self> {
        grow(file, LEN).map_err(into_io)?;
        // Inside RLIMIT_FSIZE, because `grow` was.
        file.write_all_at(&noise(), NOISE.start)?;
        file.write_all_at(&[1], BYTE_AT)?;
        file.write_all_at(&vec![0; (ZEROS.end - ZEROS.start) as usize], ZEROS.start)?;
        for gap in GAPS {
            let data = vec![1; gap as usize];
            for step in ladder(gap) {
                file.write_all_at(&data, step.start)?;
            }
        }
        // Delayed allocation counts blocks only after a sync. Not std's sync: the drive need not be
        // flushed.
        fsync(file)?;
        Ok(Self { file })
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
        let holding = |wanted: Range<u64>| {
            data.iter()
                .find(|data| data.start <= wanted.start && data.end >= wanted.end)
        };
        Ok(match (holding(NOISE), holding(BYTE_AT..BYTE_AT + 1)) {
            (Some(_), Some(byte))
                if GAPS
                    .into_iter()
                    .flat_map(ladder)
                    .all(|step| holding(step).is_some()) =>
            {
                let kept = |gap: u64| ladder(gap).all(|step| data.contains(&step));
                let finest = GAPS.into_iter().rev().take_while(|gap| kept(*gap)).last();
                let finest = finest.or_else(|| kept_block(&data)).unwrap_or(LARGE_GAP);
                SeekHole::Exact {
                    granularity: finest.max(byte.end - byte.start),
                }
            }
            _ => SeekHole::Unreliable,
        })
    }

    /// Returns whether written zeros are listed as data, if `seek_hole` is reliable.
    pub(super) fn written_zeros(&self, seek_hole: SeekHole) -> io::Result<WrittenZeros> {
        if !matches!(seek_hole, SeekHole::Exact { .. }) {
            return Ok(WrittenZeros::Unknown);
        }
        for extent in reported_extents(self.file)? {
            let Extent { range, kind } = extent?;
            if kind == ExtentKind::Hole && range.start < ZEROS.end && ZEROS.start < range.end {
                return Ok(WrittenZeros::Hole);
            }
        }
        Ok(WrittenZeros::Data)
    }

    /// Punches the noise out. The sample cannot be used afterwards.
    pub(super) fn punch(&mut self) -> io::Result<Punch> {
        fsync(self.file)?;
        let before = self.allocated()?;
        match punch_hole(self.file, NOISE) {
            Ok(()) => {}
            Err(SpaceError::Unsupported { .. }) => return Ok(Punch::Unsupported),
            // Drivers return different errors for an unsupported mode.
            Err(SpaceError::Io { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(Punch::Unsupported);
            }
            Err(error) => return Err(into_io(error)),
        }
        let mut bytes = noise();
        self.file.read_exact_at(&mut bytes, NOISE.start)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(Punch::Unsupported);
        }
        fsync(self.file)?;
        let freed = before.saturating_sub(self.allocated()?) >= WRITTEN;
        Ok(if freed { Punch::Frees } else { Punch::Zeroes })
    }
}

/// Returns the data ranges between gaps of `gap` bytes: at multiples of `gap`, and farther than
/// that from all other data.
fn ladder(gap: u64) -> impl Iterator<Item = Range<u64>> {
    let start = LADDERS_AT + 16 * gap;
    (0..STEPS).map(move |step| start + 2 * step * gap..start + (2 * step + 1) * gap)
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
        let sample = Sample::write(&file).expect("written");
        assert_eq!(
            sample.written_zeros(EXACT).expect("listed"),
            WrittenZeros::Data
        );
        let blocks = ZEROS.start + 16384..ZEROS.start + 32768;
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
}
