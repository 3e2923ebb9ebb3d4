//! Files as sources: memory files, memfds, images, block devices.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use host_memory::check_range;

use crate::populated::{PopulatedRanges, unknown};
use crate::reader::PageReader;

/// A guest's RAM in a file: a memfd or file that the VMM maps shared, or an image on disk.
///
/// `F` is a [`File`], or a borrowed or shared one (`&File`, `Arc<File>`). Reads are positioned
/// (`pread`): the position of the file is neither used nor moved, and several threads may read at
/// once. The file is not locked. If the guest runs, each page is read in its state at the time of
/// the read.
///
/// A VMM that maps its file *privately* (`MAP_PRIVATE`, `share=off` in QEMU) does not write the RAM
/// to the file. Use [`MappedMemory`](crate::MappedMemory) or `ProcessMemory` for such a guest.
///
/// The file has the bytes of the RAM, in the order of the memory file. A sealed or packed image has
/// other bytes too, which would become RAM: open it by the crate `memory-image`. The bytes are not
/// examined, because a guest controls those of raw RAM. A writer refuses a whole file whose size is
/// not that of the RAM ([`known_size`](PageReader::known_size)).
///
/// Shared memory that a process still fills by userfaultfd reads as zeros where pages are missing.
/// On Linux, `check_lazy_fill` of the crate `process-memory` finds such a process; call it before
/// and after the copy.
///
/// # Examples
/// The high region of a guest whose `memory-backend-file` has the low RAM first:
/// ```
/// use page_reader::{FileReader, PageReader};
/// # use std::io::Write;
/// # let mut backend = tempfile::tempfile()?;
/// # backend.write_all(&[1; 8192])?;
/// # backend.write_all(&[2; 4096])?;
///
/// let high_ram = FileReader::range(&backend, 8192, 4096);
/// let mut page = [0; 4096];
/// high_ram.read_at(0, &mut page)?;
/// assert!(page == [2; 4096]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FileReader<F = File> {
    file: F,
    start: u64,
    /// `u64::MAX` if the source extends to the end of the file at the time of the read.
    size: u64,
}

/// The payload of the `UnexpectedEof` error of a read past the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the file ends before byte {end:#x}, the end of a read of length {len}: check that the file is a \
     complete memory file and that the RAM size matches it"
)]
struct ShortFile {
    end: u64,
    len: usize,
}

impl<F: Borrow<File>> FileReader<F> {
    /// Returns a reader for the whole file. Its size is that of the file at the time of each read.
    pub const fn new(file: F) -> Self {
        Self::range(file, 0, u64::MAX)
    }

    /// Returns a reader for `size` bytes of the file, starting at byte `start`, which is offset 0
    /// of the source.
    ///
    /// The actual size of the file is not checked: reading bytes that it lacks fails.
    pub const fn range(file: F, start: u64, size: u64) -> Self {
        Self { file, start, size }
    }

    /// Returns the position of offset 0 in the file, in bytes.
    pub const fn start(&self) -> u64 {
        self.start
    }
}

impl<F: Borrow<File>> PageReader for FileReader<F> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.size)?;
        let len = buf.len();
        let position = self.start.saturating_add(offset);
        let end = position.saturating_add(len as u64);
        let result = if i64::try_from(end).is_ok() {
            // Retries after EINTR and short reads.
            self.file.borrow().read_exact_at(buf, position)
        } else {
            // No file is that long, and the kernel would return EINVAL for the negative offset.
            Err(io::ErrorKind::UnexpectedEof.into())
        };
        result.map_err(|error| match error.kind() {
            kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, ShortFile { end, len }),
            _ => error,
        })
    }

    /// Returns the size of a [range](Self::range), or the current size of a whole file. Returns
    /// `None` for a device, and a file that states no size, such as one in `/proc`.
    fn known_size(&self) -> Option<u64> {
        if self.size != u64::MAX {
            return Some(self.size);
        }
        let metadata = self.file.borrow().metadata().ok()?;
        let size = metadata.len().checked_sub(self.start)?;
        (metadata.is_file() && size > 0).then_some(size)
    }

    /// Returns the data that the file system reports, on the file systems whose reports are
    /// [used](sparse_file::check_holes_are_zeros): ext4 (files with extents), XFS, btrfs, tmpfs,
    /// memfds, and overlayfs over the first three. Returns all of `range` on any other. The
    /// position of the file is not moved.
    #[cfg(target_os = "linux")]
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let size = self.size.min(u64::MAX - self.start);
        let (inside, past) = (
            range.start..range.end.min(size),
            range.start.max(size)..range.end,
        );
        if inside.is_empty() {
            return Box::new(unknown(past));
        }
        let start = self.start;
        let data = crate::sys::data(self.file.borrow(), start + inside.start..start + inside.end);
        let data = data.map(move |data| data.start - start..data.end - start);
        Box::new(data.chain(unknown(past)))
    }

    /// Returns all of `range`: the holes that macOS reports are not used.
    #[cfg(not(target_os = "linux"))]
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        Box::new(unknown(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};
    use std::sync::Arc;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_range_ends_before_the_end_of_its_file() {
        let source = FileReader::range(file_of(b"0123456789"), 2, 5);
        let mut buf = [0; 5];
        source.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"23456");
        let error = source.read_at(1, &mut buf).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("past the 5 bytes"), "{error}");
    }

    #[test]
    fn a_file_shorter_than_its_range_names_the_missing_byte() {
        let source = FileReader::range(file_of(b"0123456789"), 2, 4096);
        let error = source.read_at(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(
            error.to_string().contains("ends before byte 0x1002"),
            "{error}"
        );
    }

    #[test]
    fn a_range_near_the_last_offset_does_not_overflow() {
        for start in [u64::MAX, i64::MAX as u64, i64::MAX as u64 - 1] {
            let source = FileReader::range(file_of(b"bytes"), start, u64::MAX);
            let error = source.read_at(1, &mut [0; 2]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{start}");
        }
    }

    #[test]
    fn a_whole_file_is_read_up_to_its_current_end() {
        let file = Arc::new(file_of(b"guest"));
        let source = FileReader::new(Arc::clone(&file));
        source.read_at(0, &mut [0; 6]).unwrap_err();
        (&*file).write_all(b"!").unwrap();
        source.read_at(0, &mut [0; 6]).unwrap();
    }

    #[test]
    fn known_size_is_that_of_the_range_or_of_the_file() {
        let file = file_of(b"0123456789");
        assert_eq!(FileReader::new(&file).known_size(), Some(10));
        assert_eq!(FileReader::range(&file, 4, u64::MAX).known_size(), Some(6));
        assert_eq!(FileReader::range(&file, 2, 5).known_size(), Some(5));
        for path in ["/dev/null", "/proc/self/mem"] {
            if let Ok(file) = File::open(path) {
                assert_eq!(FileReader::new(file).known_size(), None, "{path}");
            }
        }
    }

    #[test]
    fn reading_leaves_the_file_position_unchanged() {
        let mut file = file_of(b"guest");
        file.seek(io::SeekFrom::Start(3)).unwrap();
        FileReader::new(&file).read_at(1, &mut [0; 4]).unwrap();
        assert_eq!(file.stream_position().unwrap(), 3);
    }

    #[test]
    fn a_failed_read_returns_the_system_error() {
        let file = File::options().write(true).open("/dev/null").unwrap();
        let error = FileReader::new(file).read_at(0, &mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
