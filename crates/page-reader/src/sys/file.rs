//! Detection of the written parts of a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sparse_file::ExtentKind;

use super::huge_pages;
use crate::populated::{PopulatedRanges, unknown};

/// Returns the parts of `range`, positions in `file`, that may hold nonzero bytes. The part past
/// the end of the file is included.
pub(crate) fn data(file: &File, range: Range<u64>) -> PopulatedRanges<'static> {
    match reopen(file) {
        Ok(own) => data_of(own, range),
        Err(_) => Box::new(unknown(range)),
    }
}

/// Returns the same as [`data`] for a file whose position has no other users.
pub(crate) fn data_of(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    if huge_pages::is_on_hugetlbfs(&file) {
        huge_pages::data(file, range)
    } else {
        data_ranges(file, range)
    }
}

/// Opens a regular file again. `lseek` moves the position, which is shared with other users of the
/// same open file description.
fn reopen(file: &File) -> io::Result<File> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Errno::ESPIPE.into());
    }
    let own = open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let reopened = own.metadata()?;
    // Another file system may be mounted at /proc.
    if (reopened.dev(), reopened.ino()) == (metadata.dev(), metadata.ino()) {
        Ok(own)
    } else {
        Err(Errno::ESTALE.into())
    }
}

/// Opens a file without blocking if it has become a pipe.
pub(crate) fn open(path: impl AsRef<Path>) -> io::Result<File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Returns the parts of `range` of `file`, whose position has no other users, that may hold nonzero
/// bytes.
///
/// Returns all of `range` if the file system's reports of holes are not
/// [used](sparse_file::check_holes_are_zeros), because they may include data that a guest wrote
/// through a mapping. The part past the end of the file is included, so that reading it fails.
fn data_ranges(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    let mut left = range;
    let Ok(mut extents) = sparse_file::extents_in(file, left.clone()) else {
        return Box::new(unknown(left));
    };
    Box::new(iter::from_fn(move || {
        while !left.is_empty() {
            let (found, kind) = match extents.next() {
                Some(Ok(extent)) => (extent.range, extent.kind),
                // Nothing is known about ranges for which the call failed.
                Some(Err(_)) | None => (left.clone(), ExtentKind::Data),
            };
            left.start = found.end;
            if kind == ExtentKind::Data {
                return Some(found);
            }
        }
        None
    }))
}
