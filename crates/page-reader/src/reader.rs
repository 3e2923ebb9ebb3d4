//! The trait, and its implementations for pointers to readers.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::populated::in_host_memory;
use crate::{HostMemory, PopulatedRanges};

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

    /// The parts of `range` (byte offsets) that may hold anything but zeros, found without reading them.
    ///
    /// For whoever can leave zeros out: RAM that a guest never touched takes no time to save, and saving it doesn't
    /// make the host find memory for it. The ranges are ascending, within `range`, not empty, and don't overlap; they start and end
    /// wherever the source can tell, which needn't be at a page. The answer is on the safe side: *whatever is in none of
    /// them reads as zeros*, while what is in one may be zeros too. A source that can't tell, or fails to find out, gives all
    /// of `range`, and so does one for what lies past its end: that is for [`read_at`](Self::read_at) to say.
    ///
    /// Ranges are found as the iterator is asked for them: each is of some moment between this call and the one that gives it, or passes
    /// it by. What a running guest writes after that moment isn't in the answer, just as it isn't in what was read before
    /// it. So begin to track writes first, then ask and save, then save what was dirtied meanwhile.
    ///
    /// Provided: host memory is asked of the kernel, on Linux. A page of private anonymous memory is populated if it's in
    /// memory or swapped out, unless it's the shared zero page that reading makes; one of memory that is
    /// shared, as a memfd is, if its file has it, whoever wrote it, where the process may open that file (it has a descriptor of it, or
    /// `CAP_CHECKPOINT_RESTORE`) and it is on ext4, XFS, btrfs or tmpfs. Of hugetlbfs, which does not tell its holes, the file is read for it: that takes no huge page. All may be
    /// in anything else: memory that userfaultfd fills on first touch, privately mapped files, files on FUSE or a network, devices. All may be where there's no host memory, and on macOS. `ProcessMemory` asks the same of another
    /// process's memory.
    ///
    /// # Examples
    /// ```
    /// use page_reader::{FileReader, PageReader};
    /// use std::os::unix::fs::FileExt;
    ///
    /// let ram = tempfile::tempfile()?; // of 1 GiB, of which one page was written
    /// ram.set_len(1 << 30)?;
    /// ram.write_all_at(&[7; 4096], 64 << 20)?;
    ///
    /// let populated: u64 = FileReader::new(&ram)
    ///     .populated(0..1 << 30)
    ///     .map(|range| range.end - range.start)
    ///     .sum();
    /// # if cfg!(target_os = "linux") {
    /// assert!(populated <= 64 << 10);
    /// # }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        in_host_memory(|offset, len| self.host_memory(offset, len), range)
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

            fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
                (**self).populated(range)
            }
        }
    )*};
}

forward_to_the_reader_behind!(&R, Box<R>, Arc<R>);
