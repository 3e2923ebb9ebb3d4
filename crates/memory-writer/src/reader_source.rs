//! Page readers as the source of a snapshot.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use page_reader::{HostMemory, PageReader};
use sparse_file::RunSource;

use crate::error::{MemoryIoStep, SnapshotError};

/// A page reader as the source that `sparse-file` writes runs from.
pub(crate) struct ReaderSource<'r, R: ?Sized>(pub(crate) &'r R);

impl<R: PageReader + ?Sized> RunSource for ReaderSource<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }
}

/// The payload of the error of a reader that states why it has failed.
#[derive(Debug, thiserror::Error)]
#[error("the reader has failed: {0}")]
struct ReaderFailed(#[source] io::Error);

/// Returns `error` with the cause that the reader states, if its memory could not be read. The
/// kernel reports only that an address is bad.
pub(crate) fn name_cause<R: PageReader + ?Sized>(
    reader: &R,
    mut error: SnapshotError,
) -> SnapshotError {
    if let SnapshotError::MemoryIo { step, source, .. } = &mut error
        && (*step == MemoryIoStep::Read || source.raw_os_error() == Some(Errno::EFAULT as i32))
        && let Err(cause) = reader.check_source()
    {
        *source = io::Error::new(cause.kind(), ReaderFailed(cause));
    }
    error
}

/// Checks that the source of a reader did not change while the snapshot at `dest` was written.
pub(crate) fn check_source<R: PageReader + ?Sized>(
    reader: &R,
    dest: &Path,
) -> Result<(), SnapshotError> {
    reader
        .check_source()
        .map_err(|source| SnapshotError::Source {
            dest: dest.to_owned(),
            source,
        })
}
