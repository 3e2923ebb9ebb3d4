//! Byte slices, arrays and vectors as sources.

use std::io;

use host_memory::{HostMemory, available_len, check_range};

use crate::reader::PageReader;

/// A guest's RAM, or an image of it, in ordinary memory.
///
/// Borrowed bytes cannot change, so this source cannot read *running* guest memory. Use
/// [`MappedMemory`](crate::MappedMemory) for that.
impl PageReader for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.len() as u64)?;
        // The range is inside the slice, so the offset fits in usize.
        let start = offset as usize;
        buf.copy_from_slice(&self[start..start + buf.len()]);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = available_len(offset, len, self.len() as u64)?;
        let start = offset as usize;
        Some(HostMemory::from(&self[start..start + len]))
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.len() as u64)
    }
}

impl<const N: usize> PageReader for [u8; N] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.as_slice().host_memory(offset, len)
    }

    fn known_size(&self) -> Option<u64> {
        self.as_slice().known_size()
    }
}

impl PageReader for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.as_slice().host_memory(offset, len)
    }

    fn known_size(&self) -> Option<u64> {
        self.as_slice().known_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_of_a_slice_is_the_slice() {
        let bytes = vec![7; 100];
        let memory = bytes.host_memory(40, 1000).unwrap();
        assert_eq!(memory.as_ptr(), &raw const bytes[40]);
        assert_eq!(memory.len(), 60);
    }

    #[test]
    fn reading_past_the_end_names_the_size() {
        let error = [0; 100].read_at(99, &mut [0; 2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(
            error
                .to_string()
                .starts_with("a range of length 2 at offset 0x63 ends past the 100 bytes")
        );
    }
}
