//! The length of a file and the blocks behind it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::limit::SizeLimit;
use crate::sys;

/// Why the length or the blocks of a file could not be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// The file system can't do it. Nothing was changed: go on without.
    #[error("this file system cannot {operation}: go on without it, the bytes stay right")]
    Unsupported {
        /// What was to be done.
        operation: &'static str,
    },
    /// The range ends before it starts or past the largest file offset.
    #[error("the range {}..{} is no range of a file: give start <= end <= 2^63 - 1", range.start, range.end)]
    InvalidRange {
        /// The range as it was given.
        range: Range<u64>,
    },
    /// The system call failed.
    #[error("cannot {operation} for bytes {}..{}", range.start, range.end)]
    Io {
        /// What was to be done.
        operation: &'static str,
        /// The bytes concerned.
        range: Range<u64>,
        /// `EFBIG` past `RLIMIT_FSIZE` or the file system's own limit, `ENOSPC`, `EDQUOT`, `EBADF` for a descriptor that may
        /// not be written.
        source: io::Error,
    },
}

/// The bytes that the file system says it has allocated to `file` (`st_blocks`, in units of 512 bytes).
///
/// A hint for reports: delayed allocation counts only after an `fsync`, compression and metadata blocks count on some
/// file systems, and some drivers always say 0.
///
/// # Errors
/// Those of `fstat(2)`.
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// Makes `file` at least `len` bytes long, the new part a hole where the file system has holes. Never shrinks it.
///
/// The length decides what a reader sees past the last write: a dump whose last pages are clean has to be grown, a
/// seek alone changes nothing. Not for two threads that set the length of one file at a time.
///
/// # Errors
/// [`SpaceError::Io`]: `EFBIG` where `RLIMIT_FSIZE` or the file system does not allow that length (never `SIGXFSZ`),
/// `ENOSPC` on a file system without holes.
///
/// # Examples
/// ```
/// let file = tempfile::tempfile()?;
/// sparse_file::grow(&file, 1 << 20)?;
/// sparse_file::grow(&file, 4096)?;
/// assert_eq!(file.metadata()?.len(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn grow(file: &File, len: u64) -> Result<(), SpaceError> {
    let grow = || {
        if len <= file.metadata()?.len() {
            return Ok(());
        }
        SizeLimit::of(file)?.allow_len(len)?;
        file.set_len(len)
    };
    checked(&(0..len))?;
    grow().map_err(|source| failed("grow the file", 0..len, source))
}

/// Makes `file` at least `len` bytes long and sets blocks aside, so that later writes don't run out of space.
///
/// Never shrinks the file and never changes a byte. The new ranges are listed as holes by [`extents`](crate::extents())
/// until they are written, although their blocks are taken. On Linux all of `[0, len)` is reserved, holes
/// included; on macOS only what lies past the file's present end.
///
/// # Errors
/// [`SpaceError::Unsupported`] where the file system can't (the C library's slow stand-in, which writes every block, is
/// not used), [`SpaceError::Io`] with `ENOSPC` or `EFBIG` where there is no room; the file may then have been grown in part.
pub fn reserve(file: &File, len: u64) -> Result<(), SpaceError> {
    checked(&(0..len))?;
    let reserve = || {
        if len > file.metadata()?.len() {
            SizeLimit::of(file)?.allow_len(len)?;
        }
        if len == 0 {
            return Ok(());
        }
        sys::reserve(file, len)
    };
    reserve().map_err(|source| failed("reserve blocks", 0..len, source))
}

/// Makes the first `len` bytes of `to` those of `from` without copying them: both share the blocks until one is written to.
///
/// Takes no time and no space, whatever the length; on btrfs, and XFS as `mkfs` makes it. `to` may have to be grown first. Not on
/// macOS, whose APFS clones whole files only.
///
/// # Errors
/// [`SpaceError::Unsupported`] where the file system can't, the files are on two of them, or `len` is no whole number of its blocks:
/// copy. [`SpaceError::Io`] else.
pub fn share_blocks(from: &File, to: &File, len: u64) -> Result<(), SpaceError> {
    checked(&(0..len))?;
    if len == 0 {
        return Ok(());
    }
    sys::share_blocks(from, to, len)
        .map_err(|source| failed("share another file's blocks", 0..len, source))
}

/// Makes `range` read as zeros and gives back the blocks that lie wholly inside it. The file keeps its length.
///
/// What of the range lies past the end of the file is left alone.
///
/// # Errors
/// [`SpaceError::Unsupported`] where the file system has no such call: write zeros instead. [`SpaceError::Io`] else.
///
/// # Examples
/// ```
/// use sparse_file::{SpaceError, punch_hole};
/// use std::os::unix::fs::FileExt;
///
/// let file = tempfile::tempfile()?;
/// file.write_all_at(&[1; 8192], 0)?;
/// match punch_hole(&file, 0..4096) {
///     Err(SpaceError::Unsupported { .. }) => file.write_all_at(&[0; 4096], 0)?,
///     punched => punched?,
/// }
/// let mut byte = [1];
/// file.read_exact_at(&mut byte, 4095)?;
/// assert_eq!(byte, [0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn punch_hole(file: &File, range: Range<u64>) -> Result<(), SpaceError> {
    checked(&range)?;
    let punch = || {
        let end = range.end.min(file.metadata()?.len());
        if range.start >= end {
            return Ok(());
        }
        sys::punch_hole(file, range.start..end)
    };
    punch().map_err(|source| failed("punch a hole", range.clone(), source))
}

fn checked(range: &Range<u64>) -> Result<(), SpaceError> {
    if range.start <= range.end && libc::off_t::try_from(range.end).is_ok() {
        Ok(())
    } else {
        Err(SpaceError::InvalidRange {
            range: range.clone(),
        })
    }
}

fn failed(operation: &'static str, range: Range<u64>, source: io::Error) -> SpaceError {
    match source.raw_os_error() {
        Some(errno) if sys::is_unsupported(errno) => SpaceError::Unsupported { operation },
        _ => SpaceError::Io {
            operation,
            range,
            source,
        },
    }
}
