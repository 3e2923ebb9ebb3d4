//! `SEEK_DATA`: the parts of a file that were ever written.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

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
        Box::new(DataRanges::new(file, range))
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

#[derive(Debug)]
struct DataRanges {
    /// Whose position nobody else uses.
    file: File,
    left: Range<u64>,
}

impl DataRanges {
    fn new(file: File, range: Range<u64>) -> Self {
        Self { file, left: range }
    }

    /// The start of data, or where a hole starts; `None` where no data is left.
    fn seek(&self, from: u64, to: Whence) -> Result<Option<u64>, Errno> {
        let from = i64::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        match lseek(&self.file, from, to) {
            Ok(position) => u64::try_from(position).map(Some).or(Err(Errno::EOVERFLOW)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn first(&self) -> Result<Range<u64>, Errno> {
        let Range { start, end } = self.left;
        let Some(data) = self.seek(start, Whence::SeekData)? else {
            // To be found missing by whoever reads it.
            let len = self.file.metadata().map_or(0, |metadata| metadata.len());
            return Ok(start.max(len).min(end)..end);
        };
        if data >= end {
            return Ok(end..end);
        }
        // No hole after it: it was truncated meanwhile.
        let hole = self.seek(data, Whence::SeekHole)?.unwrap_or(end);
        Ok(data..hole.min(end))
    }
}

impl Iterator for DataRanges {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while !self.left.is_empty() {
            let data = self.first().unwrap_or_else(|_| self.left.clone());
            self.left.start = data.end;
            // Empty where a hole was made meanwhile.
            if !data.is_empty() {
                return Some(data);
            }
        }
        None
    }
}
