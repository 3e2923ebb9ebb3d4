//! A page reader as the source that the file layer writes from: the one place where the two meet.

#![allow(unsafe_code)]

use std::io;

use page_reader::PageReader;
use sparse_file::{Memory, Source};

/// Guest memory, to be written.
pub(crate) struct Guest<'r, R: ?Sized>(pub(crate) &'r R);

impl<R: PageReader + ?Sized> Source for Guest<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn memory_at(&self, offset: u64, len: usize) -> Option<Memory<'_>> {
        let memory = self.0.host_memory(offset, len)?;
        // SAFETY: a `HostMemory` exists only by its unsafe constructor, whose caller promised that the range stays mapped
        // and readable for the lifetime carried over here, whoever writes to it meanwhile: what `Memory::new` asks for.
        Some(unsafe { Memory::new(memory.as_ptr(), memory.len()) })
    }
}
