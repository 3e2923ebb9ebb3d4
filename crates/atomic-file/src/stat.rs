//! The status of a file.

use std::io;
use std::os::fd::AsFd;

use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::ids::{GroupId, UserId};
use crate::retry::retry;

/// Marks a generation that is a digest of a file handle. No time before the year 2262 has this bit.
pub(crate) const FROM_HANDLE: u64 = 1 << 63;

/// The identity of a file, while its file system is mounted and the file is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// The fields of `stat(2)` that this crate uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) id: FileId,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: UserId,
    pub(crate) gid: GroupId,
    pub(crate) links: u64,
    /// In bytes.
    pub(crate) allocated: u64,
    /// The time of modification: seconds since 1970, and nanoseconds.
    pub(crate) modified: (i64, i64),
}

impl Stat {
    fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.mode as libc::mode_t) & SFlag::S_IFMT
    }

    pub(crate) fn is_file(&self) -> bool {
        self.kind() == SFlag::S_IFREG
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind() == SFlag::S_IFDIR
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.kind() == SFlag::S_IFLNK
    }
}

// The types of the fields differ between systems.
#[allow(clippy::unnecessary_cast)]
impl From<FileStat> for Stat {
    fn from(stat: FileStat) -> Self {
        Self {
            id: FileId {
                device: stat.st_dev as u64,
                inode: stat.st_ino as u64,
            },
            size: stat.st_size as u64,
            mode: stat.st_mode as u32,
            uid: UserId::new(stat.st_uid as u32),
            gid: GroupId::new(stat.st_gid as u32),
            links: stat.st_nlink as u64,
            // In units of 512 bytes, independent of the block size of the file system.
            allocated: (stat.st_blocks as u64).saturating_mul(512),
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        }
    }
}

/// Returns the `stat(2)` of an open file or directory.
pub(crate) fn stat_of(fd: impl AsFd) -> io::Result<Stat> {
    let fd = fd.as_fd();
    retry(|| fstat(fd)).map(Stat::from)
}
