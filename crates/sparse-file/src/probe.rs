//! What a file system does with holes, punching and direct I/O, found out by doing it.

mod direct;
mod sample;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use direct::{AlignmentBasis, DirectIo};
use sample::Sample;

use crate::sys;

/// What the file system of one directory does, as measured by [`Capabilities::probe`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// What the file system calls itself, for reports; a number in hexadecimal for one that this crate has no name for.
    /// Nothing here was concluded from it.
    pub file_system: String,
    /// Whether ranges that were never written take space.
    pub holes: HoleSupport,
    /// Whether `SEEK_HOLE` and `SEEK_DATA` can be believed.
    pub seek_hole: SeekHole,
    /// Whether zeros that were written can be told from what was never written.
    pub written_zeros: WrittenZeros,
    /// What [`punch_hole`](crate::punch_hole()) does.
    pub punch: Punch,
    /// Direct I/O (`O_DIRECT` on Linux, `F_NOCACHE` on macOS): `None` where it can't be switched on or no aligned write
    /// and read worked.
    pub direct_io: Option<DirectIo>,
    /// The file system's preferred size of a read or write, in bytes (`st_blksize`).
    pub preferred_block_size: u64,
}

/// Whether ranges that were never written take space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HoleSupport {
    /// Only what is written is stored.
    Sparse,
    /// Everything up to the file's length is stored: HFS+, exFAT.
    Dense,
    /// The file system reports no holes, and an allocation that can't be: the Linux driver of APFS says 0 for all files.
    Unknown,
}

/// Whether `SEEK_HOLE` and `SEEK_DATA` can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SeekHole {
    /// Holes and data are told apart.
    Exact {
        /// The finest hole in bytes: a written byte turns no more than this into data, and gaps of this size
        /// between data are kept, small as they are.
        granularity: u64,
    },
    /// Everything is reported as data: safe, and no knowledge.
    AllData,
    /// The calls fail.
    Unsupported,
    /// Written, synced bytes were reported as a hole: never use them here.
    Unreliable,
}

/// What `SEEK_HOLE` says of zeros that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WrittenZeros {
    /// They are data like all else.
    Data,
    /// They are a hole: file systems that compress may store no block of zeros (ZFS). A page of zeros that was written can't be
    /// told here from one that was not.
    Hole,
    /// `SEEK_HOLE` tells nothing.
    Unknown,
}

/// What punching a hole into data does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Punch {
    /// The range reads as zeros and its space was seen to be free again.
    Frees,
    /// The range reads as zeros; that space was freed could not be seen.
    Zeroes,
    /// The call fails: write zeros instead.
    Unsupported,
}

/// Why a directory could not be probed. Whatever the probe had written is gone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No temporary file could be made.
    #[error(
        "cannot probe the file system of {dir:?}: no temporary file can be made there; give an existing, writable directory"
    )]
    CreateFile {
        /// The directory that was to be probed.
        dir: PathBuf,
        /// `ENOENT`, `ENOTDIR`, `EACCES`, `EROFS` and the like.
        source: io::Error,
    },
    /// A system call failed that a working file system carries out.
    #[error(
        "cannot probe the file system of {dir:?}: failed to {operation} a temporary file of 16 MiB"
    )]
    Io {
        /// The directory that was to be probed.
        dir: PathBuf,
        /// What was to be done with the temporary file.
        operation: &'static str,
        /// `ENOSPC` where there is no room (half a MiB with holes, 16 MiB without), `EFBIG` under a small `RLIMIT_FSIZE`.
        source: io::Error,
    },
}

impl Capabilities {
    /// Finds out what the file system of `dir` does by writing, syncing, punching and reading an unnamed file of 16 MiB there,
    /// of which some 460 KiB are written.
    ///
    /// It costs one or two `fsync`; keep the answer for as long as the directory stays on that mount. The file has no
    /// name, or loses it at once where the file system knows no unnamed files, so it is gone in every case: after an error,
    /// too.
    ///
    /// # Errors
    /// [`ProbeError`], whose source is the failed call's error. What a file system merely can't do is an answer, not an
    /// error.
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
        let mut sample = Sample::write(&file).map_err(doing("write"))?;
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
            holes: HoleSupport::judge(seek_hole, allocated),
            seek_hole,
            written_zeros,
            punch,
            direct_io,
            preferred_block_size: sample.preferred_block_size().map_err(doing("examine"))?,
        })
    }
}

impl HoleSupport {
    /// Judges by the extents reported for the synced sample and, where those say nothing, by the bytes allocated to it.
    fn judge(seek_hole: SeekHole, allocated: u64) -> Self {
        match (seek_hole, allocated) {
            (SeekHole::Exact { .. }, _) => Self::Sparse,
            (_, sample::LEN..) => Self::Dense,
            // Between what must be there and half of the file. Less than what was written can't be true.
            (_, sample::WRITTEN..=sample::HALF) => Self::Sparse,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Capabilities {
    /// One line for a report: `xfs: holes, SEEK_HOLE exact to 4096, punching frees, direct I/O at 512/512, blocks of 4096`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holes = match self.holes {
            HoleSupport::Sparse => "holes",
            HoleSupport::Dense => "no holes",
            HoleSupport::Unknown => "holes unknown",
        };
        write!(f, "{}: {holes}, SEEK_HOLE ", self.file_system)?;
        match self.seek_hole {
            SeekHole::Exact { granularity } => write!(f, "exact to {granularity}")?,
            SeekHole::AllData => f.write_str("says all data")?,
            SeekHole::Unsupported => f.write_str("unsupported")?,
            SeekHole::Unreliable => f.write_str("loses data")?,
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

    /// What the drivers were measured to say of a sparse file with little in it.
    #[rstest]
    #[case::ext4_xfs_btrfs_tmpfs(EXACT, sample::WRITTEN, HoleSupport::Sparse)]
    #[case::nfs_3_over_ext4(SeekHole::AllData, sample::WRITTEN, HoleSupport::Sparse)]
    #[case::hfs_plus_and_exfat(SeekHole::AllData, sample::LEN, HoleSupport::Dense)]
    #[case::apfs_on_linux_says_0(SeekHole::AllData, 0, HoleSupport::Unknown)]
    #[case::holes_seen_though_allocation_lies(EXACT, 0, HoleSupport::Sparse)]
    #[case::less_than_was_written(SeekHole::Unsupported, sample::WRITTEN - 512, HoleSupport::Unknown)]
    #[case::neither_sparse_nor_dense(SeekHole::AllData, sample::LEN - 512, HoleSupport::Unknown)]
    #[case::seek_that_loses_data_proves_nothing(SeekHole::Unreliable, 0, HoleSupport::Unknown)]
    fn holes_are_judged_by_evidence_that_can_be_true(
        #[case] seek_hole: SeekHole,
        #[case] allocated: u64,
        #[case] verdict: HoleSupport,
    ) {
        assert_eq!(HoleSupport::judge(seek_hole, allocated), verdict);
    }

    #[test]
    fn a_report_line_names_every_capability() {
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
