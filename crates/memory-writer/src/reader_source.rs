//! Adapts a page reader to the source that `sparse-file` writes from.

use std::io;

use page_reader::{HostMemory, PageReader};
use sparse_file::RunSource;

/// A page reader as a source of runs.
pub(crate) struct ReaderSource<'r, R: ?Sized>(pub(crate) &'r R);

impl<R: PageReader + ?Sized> RunSource for ReaderSource<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.0.host_memory(offset, len)
    }
}
