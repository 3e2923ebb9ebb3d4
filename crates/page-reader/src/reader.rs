//! The trait, and its implementations for pointers to readers.

use std::io;
use std::sync::Arc;

use crate::HostMemory;

/// A source of a guest's RAM, addressed by the byte offset from the start of the memory file.
///
/// Offset 0 is the first byte of the guest's lowest RAM region; [`RamLayout`](crate::RamLayout) says which
/// guest-physical address an offset stands for. The trait can be made into an object (`&dyn PageReader`), and is
/// implemented for `&R`, `Box<R>` and `Arc<R>`.
///
/// # Examples
/// A source of one's own: a guest whose RAM is all zeros, of any size.
/// ```
/// use std::io;
/// use page_reader::{HostMemory, PageReader};
///
/// struct Zeros {
///     size: u64,
/// }
///
/// impl PageReader for Zeros {
///     fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
///         let end = offset.checked_add(buf.len() as u64);
///         if end.is_none_or(|end| end > self.size) {
///             return Err(io::ErrorKind::UnexpectedEof.into());
///         }
///         buf.fill(0);
///         Ok(())
///     }
/// }
///
/// let guest = Zeros { size: 4096 };
/// let mut page = [1; 4096];
/// guest.read_at(0, &mut page)?;
/// assert!(page == [0; 4096]);
/// assert!(guest.host_memory(0, 4096).is_none());
/// # Ok::<(), io::Error>(())
/// ```
pub trait PageReader {
    /// Fills all of `buf` with the bytes from `offset` on, or fails. Any offset, any length, no alignment.
    ///
    /// After an error `buf` may hold anything. A range of no bytes at or before the end of the source succeeds; past the end
    /// it succeeds or is an [`UnexpectedEof`](io::ErrorKind::UnexpectedEof): where a file ends only a read tells.
    ///
    /// # Errors
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) where the range ends past the source (`offset` plus
    /// length may even overflow), otherwise whatever reading the source says. Never a short read, never a panic.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The host memory that backs the bytes from `offset` on: at least 1 and at most `len` bytes of it, or
    /// `None` where the source has no such memory there.
    ///
    /// What comes back may be shorter than `len`, at the border of two regions: ask again from where it ended. Its
    /// bytes are those that [`read_at`](Self::read_at) would give, so the kernel can read them without a copy. `None`
    /// isn't the end of the source: it means "use `read_at` here", and is also the answer to `len` 0 and past the
    /// end.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let _ = (offset, len);
        None
    }
}

/// Every method is forwarded, the provided ones too: a default used here would hide what the source can do.
macro_rules! forward_to_the_reader_behind {
    ($($pointer:ty),*) => {$(
        impl<R: PageReader + ?Sized> PageReader for $pointer {
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                (**self).read_at(offset, buf)
            }

            fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
                (**self).host_memory(offset, len)
            }
        }
    )*};
}

forward_to_the_reader_behind!(&R, Box<R>, Arc<R>);
