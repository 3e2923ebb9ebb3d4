//! Page readers as the source of a snapshot.

use std::io;
use std::path::Path;

use page_reader::{HostMemory, PageReader};
use sparse_file::RunSource;

use crate::error::SnapshotError;

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
