//! Room for guest memory, wiped when it is given up.

use std::fmt;

use zeroize::Zeroizing;

/// Room to read guest memory into, that is wiped before it goes back to the allocator: by dropping, by a panic, and when it grows.
///
/// Guest memory holds keys and passwords. A core dump, a heap read by mistake or a page swapped out later is not to have them from here.
///
/// # Examples
/// ```
/// use page_reader::{PageReader, SecretBuffer};
///
/// let ram = vec![7; 1 << 20];
/// let mut buffer = SecretBuffer::new();
/// let page = buffer.sized(4096);
/// ram.read_at(8192, page)?;
/// assert_eq!(page, [7; 4096]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Default)]
pub struct SecretBuffer(Zeroizing<Vec<u8>>);

impl SecretBuffer {
    /// An empty one, which allocates nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The first `len` bytes, to be read into: until then they are zeros, or what was read last. Making room for more than ever before gives
    /// up all that was read.
    pub fn sized(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            // A new one, as growing could move the bytes and leave their old place as it was.
            self.0 = Zeroizing::new(vec![0; len]);
        }
        &mut self.0[..len]
    }
}

/// Its size and nothing else.
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
    fn it_grows_and_keeps_its_room() {
        let mut buffer = SecretBuffer::new();
        assert_eq!(buffer.sized(0), [0; 0]);
        buffer.sized(3).fill(7);
        assert_eq!(buffer.sized(2), [7; 2]);
        assert_eq!(buffer.sized(3), [7; 3]);
        assert_eq!(buffer.sized(5), [0; 5]);
    }

    #[test]
    fn what_it_holds_is_not_said() {
        let mut buffer = SecretBuffer::new();
        buffer.sized(3).fill(199);
        assert_eq!(format!("{buffer:?}"), "SecretBuffer { len: 3, .. }");
    }
}
