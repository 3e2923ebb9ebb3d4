//! Why a snapshot was not taken.

use std::fmt;
use std::io;
use std::path::PathBuf;

use atomic_file::{CommitError, OpenError};
use dirty_bitmap::EpochReclaimed;
use image_format::FooterError;
use sparse_file::{SpaceError, WriteError};
use thiserror::Error;

use crate::raw_diff::AmbiguousDiff;
use crate::sealing::SealError;
use crate::unwritten::WipeError;

/// Why a snapshot was not taken. Unless it is [`Commit`](Self::Commit), which says more, the destination is as it was.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// No memory file has this size or this page.
    #[error("no memory file for this guest")]
    Ram(#[from] RamError),
    /// The file could not be staged.
    #[error("no snapshot was begun")]
    Open(#[from] OpenError),
    /// Guest memory could not be read, or the staged file not be written.
    #[error("{step} failed at offset {offset:#x} for the snapshot {dest:?}{}", step.advice(source))]
    MemoryIo {
        /// The snapshot's destination.
        dest: PathBuf,
        /// Which side failed.
        step: MemoryIoStep,
        /// The offset in the file, in bytes, of the first byte that is missing; reading guest memory, its offset in the RAM.
        offset: u64,
        /// What the reader or the system said.
        source: io::Error,
    },
    /// The bitmap covers another number of bytes than the memory file.
    #[error(
        "the bitmap covers {bitmap:#x} bytes, the memory file has {file:#x}: give the bitmap of this guest's RAM"
    )]
    BitmapSize {
        /// The bytes that the bitmap covers.
        bitmap: u64,
        /// The bytes of the memory file.
        file: u64,
    },
    /// The bitmap starts at another guest-physical address than [`Options::ram_start`](crate::Options::ram_start), or the bitmap before it, said.
    #[error(
        "the bitmap starts at {bitmap:#x}, this guest's RAM at {ram:#x}: give the bitmap of this guest's RAM"
    )]
    BitmapStart {
        /// The first address that the bitmap covers.
        bitmap: u64,
        /// The first address of the RAM.
        ram: u64,
    },
    /// A run of bytes is empty, ends past the RAM, begins before the last one ended, or is to be of
    /// whole pages and is not.
    #[error(
        "the run {start:#x}..{end:#x} is not one of pages of {page_size:#x} bytes in RAM of {ram_size:#x}: give runs that ascend, \
         don't overlap and end with the RAM"
    )]
    Run {
        /// The first byte of the run.
        start: u64,
        /// The end of the run.
        end: u64,
        /// The page of the memory file, in bytes.
        page_size: u64,
        /// The bytes of the memory file.
        ram_size: u64,
    },
    /// The [`CancelToken`](crate::CancelToken) was used.
    #[error("the snapshot {dest:?} was cancelled after {written} bytes of this write")]
    Cancelled {
        /// The snapshot's destination.
        dest: PathBuf,
        /// Bytes written by the call that was cancelled.
        written: u64,
    },
    /// A write failed, panicked or was cancelled before, so the staged file may lack pages.
    #[error(
        "the snapshot {dest:?} is incomplete, an earlier write to it did not succeed: open a new writer"
    )]
    Incomplete {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// Nothing was written, so there is nothing to commit.
    #[error("the snapshot {dest:?} is empty: call write_full or write_diff first")]
    NothingWritten {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// There are no random numbers for the snapshot's id.
    #[error("no id can be made for the snapshot {dest:?}: give one to Seal::id")]
    Id {
        /// The snapshot's destination.
        dest: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// [`Seal::parent`](crate::Seal::parent) was given, and all of the RAM written: a full snapshot stands on no other.
    #[error("the snapshot {dest:?} is to be full, and names a parent: name none")]
    FullWithParent {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// A sealed or packed diff was to be written without [`Seal::parent`](crate::Seal::parent): no chain of images with ids would take it.
    #[error(
        "the snapshot {dest:?} is to be a diff, and names no parent: give the id of the image before to Seal::parent, or Seal::on_raw_image if that has none"
    )]
    DiffWithoutParent {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// Metadata was given for a raw snapshot.
    #[error(
        "the snapshot {dest:?} is raw and has no place for metadata: choose Layout::Sealed or Layout::Packed"
    )]
    NotSealed {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The pages of a raw diff could not be told from its holes. From `write_diff`, nothing was written.
    #[error(
        "the raw diff {dest:?} could not be read back: choose Layout::Sealed or Layout::Packed, \
         which say which pages they hold"
    )]
    AmbiguousDiff {
        /// The snapshot's destination.
        dest: PathBuf,
        /// What keeps its holes from telling its pages.
        source: AmbiguousDiff,
    },
    /// The footer can't be written: as soon as that is known, so before pages are written where regions or metadata don't fit.
    #[error("the snapshot {dest:?} can't be sealed")]
    Seal {
        /// The snapshot's destination.
        dest: PathBuf,
        /// What of the footer doesn't fit, or what the system said.
        source: FooterError,
    },
    /// The commit failed; its error says whether the destination was replaced.
    #[error("the commit of the snapshot failed")]
    Commit(#[from] CommitError),
    /// The epoch was to be released, and has marks whose pages were not written since they were taken. Nothing was committed.
    #[error(
        "the snapshot {dest:?} was not committed, it lacks pages of the epoch to release: give write_diff what each \
         take_more returns, or the epoch's bitmap, and begin a full write after the epoch"
    )]
    EpochNotWritten {
        /// The snapshot's destination.
        dest: PathBuf,
    },
    /// The marks of the epoch were reclaimed while the snapshot was taken. It was not committed: a later save may have put its own
    /// at the destination.
    #[error("the snapshot {dest:?} was not committed")]
    EpochReclaimed {
        /// The snapshot's destination.
        dest: PathBuf,
        /// What became of the epoch.
        source: EpochReclaimed,
    },
}

/// The size of a memory file, or of its page, is impossible.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RamError {
    /// `ram_size` is 0.
    #[error("the RAM has no bytes: pass the guest's RAM size as ram_size")]
    NoRam,
    /// No machine addresses that much.
    #[error("RAM of {ram_size:#x} bytes is larger than any machine can address, 2^52")]
    TooLarge {
        /// The size asked for, in bytes.
        ram_size: u64,
    },
    /// `page_size` is 0 or not a power of two.
    #[error("a page of {page_size} bytes: the page size must be a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size asked for, in bytes.
        page_size: u64,
    },
    /// `page_size` is below 512: raw RAM is told from images by being a multiple of that.
    #[error("a page of {page_size} bytes: the page size must be at least 512")]
    PageTooSmall {
        /// The page size asked for, in bytes.
        page_size: u64,
    },
    /// `page_size` is larger than the RAM.
    #[error("a page of {page_size} bytes is larger than the RAM of {ram_size} bytes")]
    PageLargerThanRam {
        /// The page size asked for, in bytes.
        page_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// `ram_size` is no multiple of `page_size`.
    #[error(
        "RAM of {ram_size:#x} bytes is no whole number of pages of {page_size:#x} bytes: use a smaller page"
    )]
    NotWholePages {
        /// The size asked for, in bytes.
        ram_size: u64,
        /// The page size asked for, in bytes.
        page_size: u64,
    },
}

/// The step that failed in [`SnapshotError::MemoryIo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryIoStep {
    /// Setting the size of the staged file.
    SetSize,
    /// Reading guest memory.
    Read,
    /// Writing the staged file.
    Write,
    /// Wiping what a recycled file held before and was not written; see [`Options::recycle`](crate::Options::recycle).
    Wipe,
    /// Reading back what was written in several passes, for its checksum.
    ReadBack,
}

impl MemoryIoStep {
    fn advice(self, error: &io::Error) -> &'static str {
        match (self, error.kind()) {
            (Self::Read, io::ErrorKind::UnexpectedEof) => {
                ": the reader ends there, it must cover all of the RAM"
            }
            (Self::Write | Self::SetSize | Self::Wipe, io::ErrorKind::StorageFull) => {
                ": make room on the file system"
            }
            (Self::Write | Self::SetSize | Self::Wipe, io::ErrorKind::QuotaExceeded) => {
                ": raise the quota or make room within it"
            }
            (Self::Write | Self::SetSize, io::ErrorKind::FileTooLarge) => {
                ": raise RLIMIT_FSIZE, or use a file system that takes files of this size"
            }
            _ => "",
        }
    }
}

impl fmt::Display for MemoryIoStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SetSize => "setting the file's size",
            Self::Read => "reading guest memory",
            Self::Write => "writing",
            Self::Wipe => "wiping the bytes of an older snapshot",
            Self::ReadBack => "reading back what was written",
        })
    }
}

impl SnapshotError {
    pub(crate) fn from_grow(dest: PathBuf, len: u64, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::SetSize,
            offset: len,
            source: io_error(error),
        }
    }

    pub(crate) fn from_punch(dest: PathBuf, offset: u64, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::Write,
            offset,
            source: io_error(error),
        }
    }

    pub(crate) fn from_share(dest: PathBuf, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::Write,
            offset: 0,
            source: io_error(error),
        }
    }

    pub(crate) fn from_wipe(dest: PathBuf, error: WipeError) -> Self {
        let (offset, source) = match error {
            WipeError::Punch(range, source) => (range.start, source),
            WipeError::Zero(error) => match Self::from_write(dest.clone(), error) {
                Self::MemoryIo { offset, source, .. } => (offset, source),
                other => return other,
            },
        };
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::Wipe,
            offset,
            source,
        }
    }

    pub(crate) fn from_seal(dest: PathBuf, error: SealError) -> Self {
        match error {
            SealError::Id(source) => Self::Id { dest, source },
            SealError::Footer(source) => Self::Seal { dest, source },
            SealError::Grow(len, error) => Self::from_grow(dest, len, error),
            SealError::ReadBack(offset, source) => Self::MemoryIo {
                dest,
                step: MemoryIoStep::ReadBack,
                offset,
                source,
            },
        }
    }

    pub(crate) fn from_write(dest: PathBuf, error: WriteError) -> Self {
        let (step, offset, source) = match error {
            WriteError::Source { offset, source } => (MemoryIoStep::Read, offset, source),
            WriteError::Destination { offset, source, .. } => (MemoryIoStep::Write, offset, source),
            WriteError::ZeroWrite { offset, .. } => {
                (MemoryIoStep::Write, offset, io::ErrorKind::WriteZero.into())
            }
            WriteError::Cancelled { written } => return Self::Cancelled { dest, written },
            // The runs come from a bitmap that covers the file, so this is a failure of the write, whatever it is.
            other => (MemoryIoStep::Write, 0, io::Error::other(other)),
        };
        Self::MemoryIo {
            dest,
            step,
            offset,
            source,
        }
    }
}

fn io_error(error: SpaceError) -> io::Error {
    match error {
        SpaceError::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(
        MemoryIoStep::Read,
        io::ErrorKind::UnexpectedEof,
        "reading guest memory",
        "must cover"
    )]
    #[case(
        MemoryIoStep::SetSize,
        io::ErrorKind::FileTooLarge,
        "size",
        "RLIMIT_FSIZE"
    )]
    #[case(MemoryIoStep::Wipe, io::ErrorKind::StorageFull, "wiping", "make room")]
    #[case(MemoryIoStep::Write, io::ErrorKind::QuotaExceeded, "writing", "quota")]
    fn an_error_names_the_step_and_says_what_to_do(
        #[case] step: MemoryIoStep,
        #[case] kind: io::ErrorKind,
        #[case] named: &str,
        #[case] advice: &str,
    ) {
        let error = SnapshotError::MemoryIo {
            dest: PathBuf::from("vm.mem"),
            step,
            offset: 0,
            source: kind.into(),
        };
        let text = error.to_string();
        assert!(text.contains(named) && text.contains(advice), "{text}");
    }
}
