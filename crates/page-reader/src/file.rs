//! Files as a source: memory files, memfds, saved images, block devices.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::populated::unknown;
use crate::{PageReader, PopulatedRanges, range};

/// A guest's RAM in a file: a memfd or file that the guest maps shared, or an image of a guest at rest.
///
/// `F` is a [`File`], or a borrowed or shared one (`&File`, `Arc<File>`). Reads are positioned (`pread`), so the
/// file's own position is neither used nor moved, and threads may read at once. Opened files are not locked: bytes
/// that a running guest writes meanwhile come back as they are when each page is read.
///
/// A guest that maps its file *privately* (`MAP_PRIVATE`, QEMU's `share=off`) keeps what it writes to itself: its
/// RAM isn't in the file. Use [`MappedMemory`](crate::MappedMemory) or `ProcessMemory` there.
///
/// Shared memory that a process is still filling by userfaultfd reads as zeros where pages are
/// missing. On Linux, `FileReader::check_filled` finds such a process: call it before and after the
/// copy.
///
/// # Examples
/// One region of a guest whose `memory-backend-file` holds its low RAM first:
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
    /// `u64::MAX` for whatever the file holds at the time of the read.
    size: u64,
}

/// The payload of the `UnexpectedEof` error of a file that is shorter than asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the file ends before byte {end}, where the last of {len} bytes was asked for: check that it's the whole memory \
     file and that the RAM size matches it"
)]
struct ShortFile {
    end: u64,
    len: usize,
}

impl<F: Borrow<File>> FileReader<F> {
    /// The whole file, as long as it is when it is read.
    pub const fn new(file: F) -> Self {
        Self::range(file, 0, u64::MAX)
    }

    /// The `size` bytes of the file from its byte `start` on, which become offset 0 of the source.
    ///
    /// The file may still be shorter: reading what isn't there is an error, then.
    pub const fn range(file: F, start: u64, size: u64) -> Self {
        Self { file, start, size }
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn file(&self) -> &File {
        self.file.borrow()
    }

    /// The file's byte at offset 0.
    #[cfg(target_os = "linux")]
    pub(crate) const fn start(&self) -> u64 {
        self.start
    }
}

impl<F: Borrow<File>> PageReader for FileReader<F> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        range::check(offset, buf.len(), self.size)?;
        let len = buf.len();
        let position = self.start.saturating_add(offset);
        let end = position.saturating_add(len as u64);
        let result = if i64::try_from(end).is_ok() {
            // Goes on after EINTR and short reads.
            self.file.borrow().read_exact_at(buf, position)
        } else {
            // No file reaches there, and as the kernel's signed offset it would be EINVAL.
            Err(io::ErrorKind::UnexpectedEof.into())
        };
        result.map_err(|error| match error.kind() {
            kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, ShortFile { end, len }),
            _ => error,
        })
    }

    /// What the file system reports as data, where what it reports is
    /// [used](sparse_file::check_holes_are_zeros): on ext4, XFS, btrfs, tmpfs, in a memfd, and on
    /// overlayfs over the first three. On any other, all of `range`. The file's position stays.
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

    /// All of `range`: what macOS reports of holes is not used.
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
    fn a_range_ends_where_it_was_said_to_end_although_the_file_goes_on() {
        let source = FileReader::range(file_of(b"0123456789"), 2, 5);
        let mut buf = [0; 5];
        source.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"23456");
        let error = source.read_at(1, &mut buf).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("past the 5 bytes"), "{error}");
    }

    #[test]
    fn a_file_shorter_than_its_range_is_an_unexpected_end_that_names_the_byte() {
        let source = FileReader::range(file_of(b"0123456789"), 2, 4096);
        let error = source.read_at(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(
            error.to_string().contains("ends before byte 4098"),
            "{error}"
        );
    }

    #[test]
    fn a_range_that_starts_near_the_last_offset_does_not_overflow() {
        for start in [u64::MAX, i64::MAX as u64, i64::MAX as u64 - 1] {
            let source = FileReader::range(file_of(b"bytes"), start, u64::MAX);
            let error = source.read_at(1, &mut [0; 2]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{start}");
        }
    }

    #[test]
    fn a_whole_file_that_grows_can_be_read_as_far_as_it_grew() {
        let file = Arc::new(file_of(b"guest"));
        let source = FileReader::new(Arc::clone(&file));
        source.read_at(0, &mut [0; 6]).unwrap_err();
        (&*file).write_all(b"!").unwrap();
        source.read_at(0, &mut [0; 6]).unwrap();
    }

    #[test]
    fn the_position_of_the_file_is_left_where_it_was() {
        let mut file = file_of(b"guest");
        file.seek(io::SeekFrom::Start(3)).unwrap();
        FileReader::new(&file).read_at(1, &mut [0; 4]).unwrap();
        assert_eq!(file.stream_position().unwrap(), 3);
    }

    #[test]
    fn a_file_that_cannot_be_read_says_what_the_system_says() {
        let file = File::options().write(true).open("/dev/null").unwrap();
        let error = FileReader::new(file).read_at(0, &mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
