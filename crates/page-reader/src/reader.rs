//! The `PageReader` trait, and its implementations for pointers to readers.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use host_memory::HostMemory;

use crate::layout::RamLayout;
use crate::populated::PopulatedRanges;
use crate::populated_memory::in_host_memory;

/// A source of a guest's RAM, addressed by the byte offset in the memory file.
///
/// Offset 0 is the first byte of the guest's lowest RAM region. [`RamLayout`](crate::RamLayout)
/// converts between offsets and guest-physical addresses. The trait is dyn compatible
/// (`&dyn PageReader`), and implemented for `&R`, `Box<R>` and `Arc<R>`.
///
/// # Examples
/// A custom source: a guest of any size whose RAM is all zeros.
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
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a source of a guest's RAM",
    label = "this type does not implement `PageReader`",
    note = "for guest memory of the crate `vm-memory`, pass `GuestMemoryReader::new(&memory)?` \
            (feature `vm-memory` of `page-reader`)",
    note = "for a file or memfd, pass `FileReader::new(file)`",
    note = "for memory that vCPUs write, pass `MappedMemory::new(layout, regions)?`",
    note = "for any other source, implement `PageReader`: only `read_at` is required"
)]
pub trait PageReader {
    /// Fills `buf` with the bytes at `offset`. Offset and length are arbitrary and need no
    /// alignment.
    ///
    /// After an error the contents of `buf` are unspecified. An empty read at or before the end of
    /// the source succeeds. An empty read past the end either succeeds or fails with
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof), because the end of a file is only known
    /// from a read.
    ///
    /// # Errors
    /// Returns [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the range ends past the source,
    /// also if `offset` plus length overflows. Returns any error of the source. Never reads less
    /// than `buf`, and never panics.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns the host memory of the bytes at `offset`, or `None` if the source has none there.
    ///
    /// The returned range has at least 1 and at most `len` bytes. It may be shorter than `len` at
    /// the border of two regions; call again for the rest. Its bytes are those that
    /// [`read_at`](Self::read_at) returns, so the kernel can read them without a copy. `None` does
    /// not mean the end of the source, but that `read_at` is to be used. It is also returned for a
    /// `len` of 0 and past the end.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let _ = (offset, len);
        None
    }

    /// Returns the parts of `range` (byte offsets) that may hold nonzero bytes, without reading
    /// them.
    ///
    /// Skipping the rest saves time, and avoids that the host allocates memory for RAM that the
    /// guest never touched. The returned ranges are ascending, within `range`, not empty, and do
    /// not overlap. Their borders need not be page borders. The result is conservative: *bytes
    /// outside of all returned ranges read as zeros*, while bytes inside may be zeros too. A source
    /// without such knowledge, or one that fails to obtain it, returns all of `range`. The part of
    /// `range` past the end of the source is also returned; `read_at` reports the error.
    ///
    /// The iterator determines each range lazily, at some time between this call and the call of
    /// `next` that returns or passes the range. Writes of a running guest after that time are not
    /// included, just as they are not included in earlier reads. Therefore start tracking writes
    /// first, then call this method and save, then save the pages that were dirtied since.
    ///
    /// The provided method queries the kernel about host memory, on Linux:
    ///
    /// - A page of private anonymous memory is populated if it is in memory or swapped out, except
    ///   for the shared zero page, which a read creates.
    /// - A page of shared memory, such as a memfd, is populated if its file has it, regardless of
    ///   the process that wrote it. This requires that the process can open the file (it has a
    ///   descriptor of it by the name of the mapping, or `CAP_CHECKPOINT_RESTORE`), and that the
    ///   file is on ext4, XFS, btrfs or tmpfs.
    /// - A System V segment may be populated everywhere: the kernel lists it with numbers that a
    ///   memfd may have too.
    /// - hugetlbfs does not report holes, so the file is read. That allocates no huge page.
    /// - Everything else may be populated: memory that userfaultfd fills on first touch, privately
    ///   mapped files, files on FUSE or network file systems, devices.
    ///
    /// Without host memory, and on macOS, everything may be populated. `ProcessMemory` queries the
    /// kernel about the memory of another process in the same way.
    ///
    /// # Examples
    /// ```
    /// use page_reader::{FileReader, PageReader};
    /// use std::os::unix::fs::FileExt;
    ///
    /// let ram = tempfile::tempfile()?; // 1 GiB, one page of it written
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

    /// Fails if bytes that were read may not belong to one state of the source, because its files
    /// were written to or resized since it was opened.
    ///
    /// Call this after the last read, before the bytes are used. The provided method succeeds: RAM
    /// has no state of its own, and a caller that reads the RAM of a running guest tracks its
    /// writes.
    ///
    /// # Errors
    /// Returns an error that names the file.
    fn check_source(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the guest-physical ranges of the RAM, or `None` if the source does not know them.
    ///
    /// A writer of sealed or packed images records them, and refuses other ones. A reader that
    /// wraps another one should forward the call. The provided method returns `None`.
    fn ram_layout(&self) -> Option<&RamLayout> {
        None
    }

    /// Returns the size of the RAM in bytes, or `None` if the source does not know it.
    ///
    /// A writer of images refuses RAM of another size than that of its image, because bytes of the
    /// RAM would be missing in the image. A reader that wraps another one should forward the call,
    /// unless it has another size. The provided method returns the size of the
    /// [layout](Self::ram_layout).
    fn known_size(&self) -> Option<u64> {
        self.ram_layout().map(RamLayout::ram_size)
    }
}

/// Forwards all methods, the provided ones too: a default would hide the capabilities of the
/// reader.
macro_rules! forward_to_pointee {
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

            fn check_source(&self) -> io::Result<()> {
                (**self).check_source()
            }

            fn ram_layout(&self) -> Option<&RamLayout> {
                (**self).ram_layout()
            }

            fn known_size(&self) -> Option<u64> {
                (**self).known_size()
            }
        }
    )*};
}

forward_to_pointee!(&R, Box<R>, Arc<R>);
