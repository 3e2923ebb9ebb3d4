//! Sources of the bytes to write.

use std::io;

use host_memory::{HostMemory, available_len, check_range};

/// A source of the bytes of runs, addressed by their offset in the file.
///
/// The methods are those of the trait `PageReader` of the crate `page-reader`, of which this crate
/// needs a part.
pub trait RunSource {
    /// Fills all of `buf` with the bytes from `offset` on. Previous contents of `buf` are ignored.
    ///
    /// # Errors
    /// Returns an error if the bytes cannot be read, for any reason.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns the memory of this process that holds the bytes from `offset` on: at least 1 and at
    /// most `len` bytes. Returns `None` if they must be [read](Self::read_at). The kernel reads the
    /// memory directly, without a copy.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let _ = (offset, len);
        None
    }
}

/// Bytes in memory, the first of which belongs at offset 0.
impl RunSource for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.len() as u64)?;
        // The range is inside the slice, so the offset fits in usize.
        buf.copy_from_slice(&self[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = available_len(offset, len, self.len() as u64)?;
        Some(HostMemory::from(&self[offset as usize..][..len]))
    }
}
