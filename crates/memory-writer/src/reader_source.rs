//! Adapts a page reader to the source that `sparse-file` writes from.

#![allow(unsafe_code)]

use std::io;

use page_reader::PageReader;
use sparse_file::{Memory, Source};

/// ReaderSource memory as a source of bytes.
pub(crate) struct ReaderSource<'r, R: ?Sized>(pub(crate) &'r R);

impl<R: PageReader + ?Sized> Source for ReaderSource<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn memory_at(&self, offset: u64, len: usize) -> Option<Memory<'_>> {
        let memory = self.0.host_memory(offset, len)?;
        // SAFETY: a `HostMemory` exists only by its unsafe constructor. Its caller promised that
        // the range stays mapped and readable for the lifetime carried over here, even if other
        // threads write to it. `Memory::new` requires the same.
        Some(unsafe { Memory::new(memory.as_ptr(), memory.len()) })
    }
}
