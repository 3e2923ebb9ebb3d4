//! Whether two files are one, also where overlayfs gives one file two numbers.

use std::fs::{self, File, FileType, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use crate::sys;

/// What tells one file from another.
///
/// `st_dev` and `st_ino` do not suffice on overlayfs: a file has other numbers there than in the
/// directory of the layer that stores it, and in each further overlayfs of that layer. Whoever
/// overwrites a file that is also an input compares by this type.
///
/// # Examples
/// ```
/// use sparse_file::FileIdentity;
///
/// let dir = tempfile::tempdir()?;
/// let (file, link) = (dir.path().join("file"), dir.path().join("link"));
/// std::fs::write(&file, b"bytes")?;
/// std::fs::hard_link(&file, &link)?;
/// assert!(FileIdentity::at(&file)?.may_be(&FileIdentity::at(&link)?));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// Whether the file is on overlayfs.
    layered: bool,
    stored: Stored,
}

/// What overlayfs passes on from the file that it stores (`ovl_getattr`).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    kind: FileType,
    len: u64,
    blocks: u64,
    created: Option<SystemTime>,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    /// Returns the identity of the file that `path` leads to now.
    ///
    /// # Errors
    /// Those of `stat(2)` and `statfs(2)`.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::new(&fs::metadata(path)?, sys::is_layered_at(path)?))
    }

    /// Returns the identity of an open file.
    ///
    /// # Errors
    /// Those of `fstat(2)`, `fstatfs(2)` and `dup(2)`.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let of = |fd: BorrowedFd<'_>| {
            let file = File::from(fd.try_clone_to_owned()?);
            Ok(Self::new(&file.metadata()?, sys::is_layered(&file)?))
        };
        of(file.as_fd())
    }

    fn new(metadata: &Metadata, layered: bool) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            layered,
            stored: Stored {
                kind: metadata.file_type(),
                len: metadata.len(),
                blocks: metadata.blocks(),
                created: metadata.created().ok(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                changed: (metadata.ctime(), metadata.ctime_nsec()),
            },
        }
    }

    /// Returns whether both are one file, as far as can be told.
    ///
    /// That is so if device and inode number agree. It is also so if they don't, at least one of the
    /// two is on overlayfs, and both agree in length, blocks, and the times of creation, modification
    /// and change to the nanosecond: these are the ones of the file that is stored.
    ///
    /// Two files on different mounts that one program made at the same time with the same length are
    /// therefore mistaken for one, rarely; a file that is written between the two questions is not
    /// recognized.
    #[must_use]
    pub fn may_be(&self, other: &Self) -> bool {
        if self.device == other.device {
            return self.inode == other.inode;
        }
        (self.layered || other.layered) && self.stored == other.stored
    }

    /// Returns whether the file is a regular one.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.stored.kind.is_file()
    }
}
