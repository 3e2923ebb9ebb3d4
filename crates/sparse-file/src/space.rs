//! Changes the length of a file and the allocation of its blocks.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::limit::SizeLimit;
use crate::sys;

/// An error of changing the length or the blocks of a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// The file system does not support the operation. The file is unchanged.
    #[error("the file system cannot {operation}: continue without it, the bytes are correct")]
    Unsupported {
        /// The operation that failed.
        operation: &'static str,
    },
    /// The range ends before it starts, or past the largest file offset.
    #[error("the range {:#x}..{:#x} is not a valid file range: pass start <= end <= 2^63 - 1", range.start, range.end)]
    InvalidRange {
        /// The invalid range.
        range: Range<u64>,
    },
    /// The system call failed.
    #[error("failed to {operation} for bytes {:#x}..{:#x}: {source}", range.start, range.end)]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The range of bytes that the operation applied to.
        range: Range<u64>,
        /// The error of the system: `EFBIG` past `RLIMIT_FSIZE` or the limit of the file system,
        /// `ENOSPC`, `EDQUOT`, `EBADF` for a descriptor that is not open for writing.
        source: io::Error,
    },
}

/// Returns the number of bytes that the file system reports as allocated to `file` (`st_blocks`, in
/// units of 512 bytes).
///
/// Use it for reports only: delayed allocation counts only after an `fsync`, compression and
/// metadata blocks count on some file systems, and some drivers always report 0.
///
/// # Errors
/// Returns the errors of `fstat(2)`.
pub fn allocated_bytes(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// Grows `file` to at least `len` bytes. The new part is a hole if the file system supports holes.
/// Never shrinks the file.
///
/// The length determines what a reader sees past the last write: a dump whose last pages are clean
/// must be grown, because a seek alone changes nothing. Two threads must not set the length of one
/// file concurrently.
///
/// # Errors
/// Returns [`SpaceError::Io`]: `EFBIG` where `RLIMIT_FSIZE` or the file system does not permit that
/// length (never `SIGXFSZ`), `ENOSPC` on a file system without holes.
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

/// Checks that this process may write `file` up to `len` bytes: that `RLIMIT_FSIZE` permits it.
/// Changes nothing. Other limits (of the file system, of its free space, of a quota) are not
/// checked.
///
/// # Errors
/// Returns [`SpaceError::Io`] with `EFBIG` if the limit is lower.
///
/// # Examples
/// ```
/// let file = tempfile::tempfile()?;
/// sparse_file::check_len(&file, 1 << 20)?;
/// assert_eq!(file.metadata()?.len(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn check_len(file: &File, len: u64) -> Result<(), SpaceError> {
    checked(&(0..len))?;
    let allowed = SizeLimit::of(file).and_then(|limit| limit.allow_len(len));
    allowed.map_err(|source| failed("grow the file", 0..len, source))
}

/// Grows `file` to at least `len` bytes and reserves blocks, so that later writes do not run out of
/// space.
///
/// Never shrinks the file and never changes a byte. [`extents`](crate::extents()) lists the new
/// ranges as holes until they are written, although their blocks are allocated. On Linux all of
/// `[0, len)` is reserved, including holes. On macOS only the part past the present end of the file
/// is reserved.
///
/// # Errors
/// - [`SpaceError::Unsupported`] if the file system does not support it. The slow emulation of the
///   C library, which writes every block, is not used.
/// - [`SpaceError::Io`] with `ENOSPC` or `EFBIG` if there is no space. The file may then have been
///   grown in part.
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

/// Replaces the first `len` bytes of `to` with those of `from` without copying them: both files
/// share the blocks until one of them is written.
///
/// Takes no time and no space, for any length. Works on btrfs, and on XFS with the defaults of
/// `mkfs`. `to` may have to be grown first. Not available on macOS, whose APFS clones whole files
/// only.
///
/// # Errors
/// - [`SpaceError::Unsupported`] if the file system does not support it, the files are on different
///   file systems, or `len` is not a multiple of the block size: copy the bytes instead.
/// - [`SpaceError::Io`] for other failures.
pub fn share_blocks(from: &File, to: &File, len: u64) -> Result<(), SpaceError> {
    checked(&(0..len))?;
    if len == 0 {
        return Ok(());
    }
    sys::share_blocks(from, to, len)
        .map_err(|source| failed("share another file's blocks", 0..len, source))
}

/// Makes `range` read as zeros and frees the blocks that are entirely inside it. The length of the
/// file does not change.
///
/// The part of the range past the end of the file is ignored.
///
/// # Errors
/// - [`SpaceError::Unsupported`] if the file system does not support it: write zeros instead.
/// - [`SpaceError::Io`] for other failures.
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
