//! Provides a page-aligned buffer without unsafe code.

use zeroize::Zeroizing;

use crate::Memory;

/// The alignment of buffers: at least any page size or direct-I/O alignment in use (64 KiB pages on
/// arm64).
pub(crate) const ALIGNMENT: usize = 64 << 10;

/// A buffer that is aligned to 64 KiB and wiped on drop, because it holds copies of guest memory.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
}

impl AlignedBuffer {
    /// Creates a buffer of `len` zero bytes.
    pub(crate) fn new(len: usize) -> Self {
        let bytes = Zeroizing::new(vec![0; len + ALIGNMENT]);
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start }
    }

    /// Returns all bytes from the aligned one on: `len` of them, and at most 64 KiB more.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }

    /// Returns the first `len` aligned bytes, for the kernel to read.
    pub(crate) fn memory(&self, len: usize) -> Memory<'_> {
        Memory::from(&self.bytes[self.start..][..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_aligned_and_has_the_requested_length() {
        for len in [1, 4096, 1 << 20] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.bytes().as_ptr().addr() % ALIGNMENT, 0);
            assert!(buffer.bytes().len() >= len);
        }
    }
}
