//! A buffer for guest memory that is zeroed when it is released.

use std::fmt;

use zeroize::Zeroizing;

/// A buffer for guest memory that is zeroed before it returns to the allocator: on drop, during
/// unwinding, and when it grows.
///
/// Guest memory holds keys and passwords. This type keeps them out of core dumps, swap and later
/// reads of the heap.
///
/// # Examples
/// ```
/// use host_memory::{HostMemory, SecretBuffer};
///
/// let ram = vec![7; 4096];
/// let mut buffer = SecretBuffer::new();
/// let page = buffer.sized(4096);
/// HostMemory::from(&ram[..]).copy_to(page);
/// assert_eq!(page, [7; 4096]);
/// ```
#[derive(Default)]
pub struct SecretBuffer(Zeroizing<Vec<u8>>);

impl SecretBuffer {
    /// Creates an empty buffer, without allocation.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the first `len` bytes of the buffer, which is grown if it is shorter.
    ///
    /// The bytes are zeros or the result of earlier reads. Growing discards all earlier contents.
    pub fn sized(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            // Growing in place could move the bytes without zeroing their old location.
            self.0 = Zeroizing::new(vec![0; len]);
        }
        &mut self.0[..len]
    }
}

/// Formats the length, not the contents.
impl fmt::Debug for SecretBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretBuffer")
            .field("len", &self.0.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_grows_and_keeps_its_capacity() {
        let mut buffer = SecretBuffer::new();
        assert_eq!(buffer.sized(0), [0; 0]);
        buffer.sized(3).fill(7);
        assert_eq!(buffer.sized(2), [7; 2]);
        assert_eq!(buffer.sized(3), [7; 3]);
        assert_eq!(buffer.sized(5), [0; 5]);
    }

    #[test]
    fn debug_output_omits_the_contents() {
        let mut buffer = SecretBuffer::new();
        buffer.sized(3).fill(199);
        assert_eq!(format!("{buffer:?}"), "SecretBuffer { len: 3, .. }");
    }
}
