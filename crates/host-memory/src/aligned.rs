//! A buffer for direct I/O, without unsafe code.

use std::fmt;

use zeroize::Zeroizing;

use crate::memory::HostMemory;

/// A buffer of fixed length whose address suits direct I/O, zeroed before it returns to the
/// allocator: on drop, and during unwinding.
///
/// The address is a multiple of [`ALIGNMENT`](Self::ALIGNMENT).
///
/// # Examples
/// ```
/// use host_memory::AlignedBuffer;
///
/// let mut buffer = AlignedBuffer::new(4096);
/// buffer.bytes_mut().fill(7);
/// assert_eq!(buffer.memory(512).as_ptr().addr() % AlignedBuffer::ALIGNMENT, 0);
/// ```
pub struct AlignedBuffer {
    /// The bytes of the buffer after at most [`ALIGNMENT`](Self::ALIGNMENT) unused ones.
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// The alignment in bytes: at least any page size or direct I/O alignment in use (64 KiB pages
    /// on arm64).
    pub const ALIGNMENT: usize = 64 << 10;

    /// Creates a buffer of `len` zero bytes. The allocation is up to [`ALIGNMENT`](Self::ALIGNMENT)
    /// bytes larger.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let bytes = Zeroizing::new(vec![0; len + Self::ALIGNMENT]);
        let start = bytes.as_ptr().align_offset(Self::ALIGNMENT);
        Self { bytes, start, len }
    }

    /// Returns the bytes of the buffer.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }

    /// Returns the first `len` bytes as memory for the kernel to read. The address stays the same
    /// when the buffer is moved.
    ///
    /// # Panics
    /// Panics if the buffer is shorter than `len`.
    #[must_use]
    pub fn memory(&self, len: usize) -> HostMemory<'_> {
        HostMemory::from(&self.bytes[self.start..][..self.len][..len])
    }
}

/// Formats the length, not the contents.
impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_has_the_requested_length() {
        for len in [0, 1, 4096, 1 << 20] {
            let mut buffer = AlignedBuffer::new(len);
            assert_eq!(
                buffer.bytes_mut().as_ptr().addr() % AlignedBuffer::ALIGNMENT,
                0
            );
            assert_eq!(buffer.bytes_mut(), vec![0; len]);
        }
    }

    #[test]
    fn memory_is_the_start_of_the_bytes() {
        let mut buffer = AlignedBuffer::new(3);
        buffer.bytes_mut().copy_from_slice(&[1, 2, 3]);
        let mut copy = [0; 2];
        buffer.memory(2).copy_to(&mut copy);
        assert_eq!(copy, [1, 2]);
        let address = buffer.memory(2).as_ptr();
        let moved = Box::new(buffer);
        assert_eq!(moved.memory(2).as_ptr(), address);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn memory_past_the_length_panics() {
        let _ = AlignedBuffer::new(3).memory(4);
    }

    #[test]
    fn debug_output_omits_the_contents() {
        let mut buffer = AlignedBuffer::new(3);
        buffer.bytes_mut().fill(199);
        assert_eq!(format!("{buffer:?}"), "AlignedBuffer { len: 3, .. }");
    }
}
