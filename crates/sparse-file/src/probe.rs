//! Probes how a file system treats holes, punching and direct I/O.

mod behavior;
mod direct;
mod sample;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use behavior::{HoleSupport, Punch, SeekHole, WrittenZeros};
pub use direct::{AlignmentBasis, DirectIo};
use sample::{Layout, Sample};

use crate::sys;

/// The capabilities of the file system of a directory, as measured by [`Capabilities::probe`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The name of the file system, for reports. A number in hexadecimal if this crate has no name
    /// for it. No other field is derived from it.
    pub file_system: String,
    /// Whether ranges that were never written take space.
    pub holes: HoleSupport,
    /// Whether `SEEK_HOLE` and `SEEK_DATA` are reliable for synced data. Dirty pages may still be
    /// reported as holes: [`check_holes_are_zeros`](crate::check_holes_are_zeros) decides.
    pub seek_hole: SeekHole,
    /// Whether written zeros are distinguishable from ranges that were never written.
    pub written_zeros: WrittenZeros,
    /// The effect of [`punch_hole`](crate::punch_hole()).
    pub punch: Punch,
    /// Direct I/O (`O_DIRECT` on Linux, `F_NOCACHE` on macOS). `None` if it cannot be enabled, or
    /// if no aligned write and read worked.
    pub direct_io: Option<DirectIo>,
    /// The file system's preferred size of a read or write, in bytes (`st_blksize`).
    pub preferred_block_size: u64,
}

/// An error of probing a directory. Everything that the probe wrote is removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No temporary file could be created.
    #[error(
        "failed to create a temporary file in {dir:?} to probe its file system: pass an existing, \
         writable directory: {source}"
    )]
    CreateFile {
        /// The directory that was to be probed.
        dir: PathBuf,
        /// The error of the system: `ENOENT`, `ENOTDIR`, `EACCES`, `EROFS` and others.
        source: io::Error,
    },
    /// A system call failed that succeeds on a working file system.
    #[error(
        "failed to probe the file system of {dir:?}: could not {operation} a temporary file of {} \
         MiB: {source}",
        sample::HERE.len >> 20
    )]
    Io {
        /// The directory that was to be probed.
        dir: PathBuf,
        /// The operation on the temporary file that failed.
        operation: &'static str,
        /// The error of the system: `ENOSPC` if there is no space (0.5 MiB with holes, the size of
        /// the file without), `EFBIG` under a small `RLIMIT_FSIZE`.
        source: io::Error,
    },
}

impl Capabilities {
    /// Probes the file system of `dir` by writing, syncing, punching and reading an unnamed file of
    /// 16 MiB there (128 MiB on macOS), of which about 460 KiB are written.
    ///
    /// The probe makes one or two `fsync` calls. Keep the result for as long as the directory stays
    /// on that mount. The file has no name, or is unlinked at once where the file system does not
    /// support unnamed files, so it is removed in every case, including errors.
    ///
    /// # Errors
    /// Returns a [`ProbeError`], whose source is the error of the failed call. A missing capability
    /// is a result, not an error.
    ///
    /// # Examples
    /// ```
    /// use sparse_file::{Capabilities, HoleSupport};
    ///
    /// let dir = tempfile::tempdir()?;
    /// let here = Capabilities::probe(dir.path())?;
    /// if here.holes == HoleSupport::Dense {
    ///     println!("{} stores a sparse file whole", here.file_system);
    /// }
    /// if let Some(direct) = here.direct_io {
    ///     assert!(direct.offset_align.is_power_of_two());
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn probe(dir: &Path) -> Result<Self, ProbeError> {
        // The empty parent of a bare file name means the current directory.
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        let file = tempfile::tempfile_in(dir).map_err(|source| ProbeError::CreateFile {
            dir: dir.into(),
            source,
        })?;
        let doing = |operation| {
            move |source| ProbeError::Io {
                dir: dir.into(),
                operation,
                source,
            }
        };
        let mut sample = Sample::write(&file, sample::HERE).map_err(doing("write"))?;
        let allocated = sample.allocated().map_err(doing("examine"))?;
        let seek_hole = sample.seek_hole().map_err(doing("list the extents of"))?;
        let written_zeros = sample
            .written_zeros(seek_hole)
            .map_err(doing("list the extents of"))?;
        let granularity = match seek_hole {
            SeekHole::Exact { granularity } => Some(granularity),
            _ => None,
        };
        let direct_io = direct::probe(&file, granularity).map_err(doing("do direct I/O on"))?;
        let punch = sample.punch().map_err(doing("punch a hole into"))?;
        Ok(Self {
            file_system: sys::file_system_name(&file).map_err(doing("name the file system of"))?,
            holes: HoleSupport::from_evidence(sample::HERE, seek_hole, allocated),
            seek_hole,
            written_zeros,
            punch,
            direct_io,
            preferred_block_size: sample.preferred_block_size().map_err(doing("examine"))?,
        })
    }
}

impl HoleSupport {
    /// Derives the support from the extents reported for the synced sample or, if these provide no
    /// information, from the bytes allocated to it.
    fn from_evidence(layout: Layout, seek_hole: SeekHole, allocated: u64) -> Self {
        if matches!(seek_hole, SeekHole::Exact { .. }) {
            return Self::Sparse;
        }
        // Between the minimum allocation and half of the file. Less than what was written is
        // impossible.
        let sparse = sample::WRITTEN..=layout.half();
        match allocated {
            all if all >= layout.len => Self::Dense,
            part if sparse.contains(&part) => Self::Sparse,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Capabilities {
    /// Formats a line for a report: `xfs: holes, SEEK_HOLE exact to 4096, punching frees, direct
    /// I/O at 512/512, blocks of 4096`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holes = match self.holes {
            HoleSupport::Sparse => "holes",
            HoleSupport::Dense => "no holes",
            HoleSupport::Unknown => "holes unknown",
        };
        write!(f, "{}: {holes}, SEEK_HOLE ", self.file_system)?;
        match self.seek_hole {
            SeekHole::Exact { granularity } => write!(f, "exact to {granularity}")?,
            SeekHole::AllData => f.write_str("reports all data")?,
            SeekHole::Unsupported => f.write_str("unsupported")?,
            SeekHole::Unreliable => f.write_str("unreliable")?,
        }
        if self.written_zeros == WrittenZeros::Hole {
            f.write_str(", written zeros become holes")?;
        }
        f.write_str(match self.punch {
            Punch::Frees => ", punching frees",
            Punch::Zeroes => ", punching zeroes",
            Punch::Unsupported => ", no punching",
        })?;
        match self.direct_io {
            Some(direct) => write!(
                f,
                ", direct I/O at {}/{}",
                direct.memory_align, direct.offset_align
            )?,
            None => f.write_str(", no direct I/O")?,
        }
        write!(f, ", blocks of {}", self.preferred_block_size)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const EXACT: SeekHole = SeekHole::Exact { granularity: 4096 };

    /// Measured reports of the drivers for a sparse file with little data.
    #[rstest]
    #[case::ext4_xfs_btrfs_tmpfs(EXACT, sample::WRITTEN, HoleSupport::Sparse)]
    #[case::nfs_3_over_ext4(SeekHole::AllData, sample::WRITTEN, HoleSupport::Sparse)]
    #[case::hfs_plus_and_exfat(SeekHole::AllData, sample::HERE.len, HoleSupport::Dense)]
    #[case::apfs_on_linux_reports_0(SeekHole::AllData, 0, HoleSupport::Unknown)]
    #[case::holes_reported_despite_wrong_allocation(EXACT, 0, HoleSupport::Sparse)]
    #[case::less_than_was_written(SeekHole::Unsupported, sample::WRITTEN - 512, HoleSupport::Unknown)]
    #[case::neither_sparse_nor_dense(SeekHole::AllData, sample::HERE.len - 512, HoleSupport::Unknown)]
    #[case::unreliable_seek_is_ignored(SeekHole::Unreliable, 0, HoleSupport::Unknown)]
    fn holes_are_derived_from_possible_evidence(
        #[case] seek_hole: SeekHole,
        #[case] allocated: u64,
        #[case] verdict: HoleSupport,
    ) {
        let found = HoleSupport::from_evidence(sample::HERE, seek_hole, allocated);
        assert_eq!(found, verdict);
    }

    #[test]
    fn report_line_names_every_capability() {
        let capabilities = Capabilities {
            file_system: "xfs".into(),
            holes: HoleSupport::Sparse,
            seek_hole: EXACT,
            written_zeros: WrittenZeros::Hole,
            punch: Punch::Frees,
            direct_io: None,
            preferred_block_size: 4096,
        };
        assert_eq!(
            capabilities.to_string(),
            "xfs: holes, SEEK_HOLE exact to 4096, written zeros become holes, punching frees, no direct I/O, blocks of 4096"
        );
    }
}
