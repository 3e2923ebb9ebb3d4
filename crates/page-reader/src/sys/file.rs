//! The parts of a file that were ever written.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sparse_file::Kind;

use super::mappings::Area;
use super::{huge_pages, is_behind};
use crate::populated::{PopulatedRanges, unknown};

/// The parts of `range`, positions in `file`, that may hold anything but zeros. What is past its end may.
pub(crate) fn data(file: &File, range: Range<u64>) -> PopulatedRanges<'static> {
    match reopen(file) {
        Ok(own) => data_of(own, range),
        Err(_) => Box::new(unknown(range)),
    }
}

/// The same of a file whose position nobody else uses.
pub(super) fn data_of(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    if huge_pages::is_on_hugetlbfs(&file) {
        huge_pages::data(file, range)
    } else {
        data_ranges(file, range)
    }
}

/// A regular file by another description: asking moves the position, which is not ours to move.
fn reopen(file: &File) -> io::Result<File> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Errno::ESPIPE.into());
    }
    let own = open(&format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let reopened = own.metadata()?;
    // What is mounted at /proc may be something else.
    if (reopened.dev(), reopened.ino()) == (metadata.dev(), metadata.ino()) {
        Ok(own)
    } else {
        Err(Errno::ESTALE.into())
    }
}

/// The file that a shared mapping of `process` shows: by way of the mapping, which takes `CAP_CHECKPOINT_RESTORE`, or of a descriptor
/// that the process still has of it. Where the process is another by now, its files aren't the one behind `area`.
pub(super) fn file_behind(area: &Area, process: &str) -> Option<File> {
    let Range { start, end } = area.addresses;
    let of_mapping = open(&format!("{process}/map_files/{start:x}-{end:x}"));
    of_mapping
        .ok()
        .filter(|file| is_behind(file, area))
        .or_else(|| {
            let descriptors = fs::read_dir(format!("{process}/fd")).ok()?;
            descriptors.flatten().find_map(|descriptor| {
                let path = descriptor.path();
                let metadata = fs::metadata(&path).ok()?;
                let same = (metadata.dev(), metadata.ino()) == (area.device, area.inode);
                let file = open(path.to_str().filter(|_| same && metadata.is_file())?).ok()?;
                is_behind(&file, area).then_some(file)
            })
        })
}

/// Without waiting, should it have become a pipe meanwhile.
fn open(path: &str) -> io::Result<File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// The parts of `range` of `file`, whose position nobody else uses, that may hold anything but
/// zeros.
///
/// All of it, where the file system's reports of holes are not [used](sparse_file::check_holes_are_zeros):
/// what a guest wrote through a mapping may be in them. What is past the end may hold anything, so
/// that reading it fails.
fn data_ranges(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    let mut left = range;
    let Ok(mut extents) = sparse_file::extents_in(file, left.clone()) else {
        return Box::new(unknown(left));
    };
    Box::new(iter::from_fn(move || {
        while !left.is_empty() {
            let (found, kind) = match extents.next() {
                Some(Ok(extent)) => (extent.range, extent.kind),
                // Of what the system failed to say, nothing is known.
                Some(Err(_)) | None => (left.clone(), Kind::Data),
            };
            left.start = found.end;
            if kind == Kind::Data {
                return Some(found);
            }
        }
        None
    }))
}
