//! A page-aligned buffer without unsafe code.

use zeroize::Zeroizing;

use crate::Memory;

/// As large as any page or direct-I/O alignment in use (64 KiB pages on arm64).
pub(crate) const ALIGNMENT: usize = 64 << 10;

/// Bytes whose first one stands at a multiple of 64 KiB, wiped when it is dropped: guest memory passes through.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
}

impl AlignedBuffer {
    /// `len` zero bytes.
    pub(crate) fn new(len: usize) -> Self {
        let bytes = Zeroizing::new(vec![0; len + ALIGNMENT]);
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start }
    }

    /// All bytes from the aligned one on: `len` of them, and at most 64 KiB more.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }

    /// The first `len` bytes from the aligned one on, for the kernel to read.
    pub(crate) fn memory(&self, len: usize) -> Memory<'_> {
        Memory::from(&self.bytes[self.start..][..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_is_aligned_and_holds_what_was_asked_for() {
        for len in [1, 4096, 1 << 20] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!(buffer.bytes().as_ptr().addr() % ALIGNMENT, 0);
            assert!(buffer.bytes().len() >= len);
        }
    }
}
