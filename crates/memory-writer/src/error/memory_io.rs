//! The steps of a write that access guest memory or the staged file.

use std::fmt;
use std::io;

/// The step that failed in [`SnapshotError::MemoryIo`](crate::SnapshotError::MemoryIo).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryIoStep {
    /// Setting the size of the staged file.
    SetSize,
    /// Reading guest memory.
    Read,
    /// Writing the staged file.
    Write,
    /// Wiping the bytes of a recycled file that were not overwritten; see
    /// [`MemoryWriterOptions::recycle`](crate::MemoryWriterOptions::recycle).
    Wipe,
    /// Syncing an [open file](crate::MemoryWriterOptions::open_file).
    Sync,
    /// Reading chunks back that were written in several passes, for their checksums.
    ReadBack,
}

impl MemoryIoStep {
    /// Returns what to do about `error` of this step.
    pub(super) fn advice(self, error: &io::Error) -> &'static str {
        match (self, error.kind()) {
            (Self::Read, io::ErrorKind::UnexpectedEof) => {
                ": the reader ends there, but must cover all of the RAM"
            }
            (Self::Write | Self::SetSize | Self::Wipe, io::ErrorKind::StorageFull) => {
                ": make room on the file system"
            }
            (Self::Write | Self::SetSize | Self::Wipe, io::ErrorKind::QuotaExceeded) => {
                ": raise the quota or make room within it"
            }
            (Self::Write, io::ErrorKind::WouldBlock) => {
                ": the output is nonblocking: clear O_NONBLOCK, and send the image again"
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
            Self::Sync => "syncing the file",
            Self::ReadBack => "reading back the written chunks",
        })
    }
}
