//! Detection of the written parts of a file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sparse_file::ExtentKind;

use super::mappings::Mapping;
use super::{huge_pages, is_behind};
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
pub(super) fn data_of(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
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
    let own = open(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let reopened = own.metadata()?;
    // Another file system may be mounted at /proc.
    if (reopened.dev(), reopened.ino()) == (metadata.dev(), metadata.ino()) {
        Ok(own)
    } else {
        Err(Errno::ESTALE.into())
    }
}

/// Opens the file of a shared mapping of `process`.
///
/// The file is opened through the mapping, which requires `CAP_CHECKPOINT_RESTORE`, or through a
/// descriptor of the process. If `process` denotes another program by now, none of its files is the
/// file of the mapping.
pub(super) fn file_behind(mapping: &Mapping, process: &str) -> Option<File> {
    let Range { start, end } = mapping.addresses;
    let of_mapping = open(&format!("{process}/map_files/{start:x}-{end:x}"));
    of_mapping
        .ok()
        .filter(|file| is_behind(file, mapping))
        .or_else(|| {
            let descriptors = fs::read_dir(format!("{process}/fd")).ok()?;
            descriptors.flatten().find_map(|descriptor| {
                let path = descriptor.path();
                let metadata = fs::metadata(&path).ok()?;
                let same = (metadata.dev(), metadata.ino()) == (mapping.device, mapping.inode);
                let file = open(path.to_str().filter(|_| same && metadata.is_file())?).ok()?;
                is_behind(&file, mapping).then_some(file)
            })
        })
}

/// Opens a file without blocking if it has become a pipe.
fn open(path: &str) -> io::Result<File> {
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
