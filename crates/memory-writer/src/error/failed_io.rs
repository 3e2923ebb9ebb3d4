//! Errors of snapshots made of those of files.

use std::io;
use std::path::PathBuf;

use sparse_file::{SpaceError, WriteError, ZeroError};

use super::{MemoryIoStep, SnapshotError};

impl SnapshotError {
    pub(crate) fn set_size_failed(dest: PathBuf, len: u64, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::SetSize,
            offset: len,
            source: io_error(error),
        }
    }

    pub(crate) fn punch_failed(dest: PathBuf, offset: u64, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::Write,
            offset,
            source: io_error(error),
        }
    }

    pub(crate) fn reflink_failed(dest: PathBuf, error: SpaceError) -> Self {
        Self::MemoryIo {
            dest,
            step: MemoryIoStep::Write,
            offset: 0,
            source: io_error(error),
        }
    }

    pub(crate) fn wipe_failed(dest: PathBuf, error: ZeroError) -> Self {
        let (offset, source) = match error {
            ZeroError::Punch(SpaceError::Io { range, source, .. }) => (range.start, source),
            ZeroError::Punch(other) => (0, io_error(other)),
            ZeroError::Write(error) => match Self::write_failed(dest.clone(), error) {
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

    pub(crate) fn write_failed(dest: PathBuf, error: WriteError) -> Self {
        let (step, offset, source) = match error {
            WriteError::Source { offset, source } => (MemoryIoStep::Read, offset, source),
            WriteError::Destination { offset, source, .. } => (MemoryIoStep::Write, offset, source),
            WriteError::ZeroWrite { offset, .. } => {
                (MemoryIoStep::Write, offset, io::ErrorKind::WriteZero.into())
            }
            WriteError::Cancelled { written } => return Self::Cancelled { dest, written },
            // The runs come from a bitmap that covers the file, so this is a failure of the write.
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
