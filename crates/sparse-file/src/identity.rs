//! Compares the identity of files, including files on overlayfs, which have several inode numbers.

use std::fs::{self, File, FileType, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use crate::sys::{self, StoredHandle};

/// The identity of a file.
///
/// `st_dev` and `st_ino` are not sufficient on overlayfs: a file has other numbers there than in
/// the directory of the layer that stores it, and in each further overlayfs of that layer. Compare
/// with this type before overwriting a file that may also be an input.
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
    /// The handle of the file that is stored, if known.
    handle: Option<StoredHandle>,
    stored: Stored,
}

/// Attributes of the stored file that overlayfs reports as its own (`ovl_getattr`).
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
    /// Returns the identity of the file that `path` currently refers to.
    ///
    /// # Errors
    /// Returns the errors of `stat(2)` and `statfs(2)`.
    pub fn at(path: &Path) -> io::Result<Self> {
        let (metadata, layered) = (fs::metadata(path)?, sys::is_layered_at(path)?);
        let handle = sys::stored_handle_at(path, layered);
        Ok(Self::new(&metadata, layered, handle))
    }

    /// Returns the identity of an open file.
    ///
    /// # Errors
    /// Returns the errors of `fstat(2)`, `fstatfs(2)` and `dup(2)`.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let of = |fd: BorrowedFd<'_>| {
            let file = File::from(fd.try_clone_to_owned()?);
            let (metadata, layered) = (file.metadata()?, sys::is_layered(&file)?);
            let handle = sys::stored_handle(&file, layered);
            Ok(Self::new(&metadata, layered, handle))
        };
        of(file.as_fd())
    }

    fn new(metadata: &Metadata, layered: bool, handle: Option<StoredHandle>) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            layered,
            handle,
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

    /// Returns whether both refer to one file, as far as this can be determined.
    ///
    /// They do if device and inode number are equal. If at least one of them is on overlayfs, the
    /// handles of the stored files are compared (Linux 6.6 and later, for files that were created
    /// on the overlay). If one of these is not known, the files count as one if they have the same
    /// length, blocks, and times of creation, modification and change to the nanosecond: overlayfs
    /// takes these from the stored file.
    ///
    /// Without handles, and for a file that the lower layer stores or stored, this is wrong in rare
    /// cases: two files of the same length that one program created on different mounts at the same
    /// time count as one, and a file that is written between the two queries is not recognized.
    #[must_use]
    pub fn may_be(&self, other: &Self) -> bool {
        if self.device == other.device {
            return self.inode == other.inode;
        }
        if !self.layered && !other.layered {
            return false;
        }
        match (&self.handle, &other.handle) {
            // A handle is unique in one file system only; the time of creation never changes.
            (Some(one), Some(another)) => {
                one == another && self.stored.created == other.stored.created
            }
            _ => self.stored == other.stored,
        }
    }

    /// Returns whether the file is a regular one.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.stored.kind.is_file()
    }
}
