//! Where the bytes of a guest's RAM come from: the PageReader trait, its sources, and the layout of guest-physical memory.

mod host_memory;

pub use host_memory::HostMemory;

use std::io;

/// A source of a guest's RAM, addressed by the byte offset from the start of the memory file.
pub trait PageReader {
    /// Fills all of `buf` from `offset` on, or fails.
    ///
    /// # Errors
    /// `UnexpectedEof` where the range ends past the source, or whatever reading it says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The host memory that backs the bytes from `offset` on: at least 1 and at most `len` bytes of it, or
    /// `None` where the source has no such memory.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let _ = (offset, len);
        None
    }
}
