//! Which file a commit is to replace, and what that was when it was read.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::destination::Destination;
use crate::directory::{FileId, Stat};
use crate::sys::{Lock, Unlock, try_lock};

/// One version of a file: which file it is, and what it was when it was read.
///
/// A writer that is opened with [`Options::replace_only`](crate::Options::replace_only) replaces this
/// version and no other: what another writer put in its place since then stays.
///
/// The file is known by its device and inode, its size, and the time of its last write. It is held
/// open, so no other file gets its inode number, and no writer [recycles](crate::Options::recycle) it. Its mode, owner and attributes
/// may change, and links to it may be made: those are no other version.
///
/// # Examples
/// ```
/// use std::fs::File;
/// use std::io::Read;
/// use std::sync::Arc;
/// use atomic_file::{AtomicWriter, CommitError, FileVersion};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("counter");
/// # std::fs::write(&path, "1")?;
///
/// let file = Arc::new(File::open(&path)?);
/// let version = FileVersion::new(Arc::clone(&file), &file.metadata()?);
/// let mut text = String::new();
/// (&*file).read_to_string(&mut text)?;
///
/// let writer = AtomicWriter::options().replace_only(version).open(&path)?;
/// writer.write_all_at((text.parse::<u64>()? + 1).to_string().as_bytes(), 0)?;
/// match writer.commit() {
///     Ok(()) => println!("incremented"),
///     Err(CommitError::DestinationChanged { .. }) => println!("another writer was faster: read it again"),
///     Err(other) => return Err(other.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FileVersion {
    file: Arc<File>,
    stamp: Stamp,
}

/// What distinguishes a version from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    id: FileId,
    size: u64,
    modified: (i64, i64),
}

impl From<&Stat> for Stamp {
    fn from(stat: &Stat) -> Self {
        let Stat {
            id, size, modified, ..
        } = *stat;
        Self { id, size, modified }
    }
}

impl FileVersion {
    /// Returns the version of `file` that `metadata` describes: the file's own, taken before its bytes
    /// are read.
    #[must_use]
    pub fn new(file: Arc<File>, metadata: &Metadata) -> Self {
        let id = FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        let stamp = Stamp {
            id,
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        };
        Self { file, stamp }
    }

    /// Returns the open file.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the open file is this version still: it was not resized or written to.
    ///
    /// # Errors
    /// Those of `fstat(2)`.
    pub fn is_current(&self) -> io::Result<bool> {
        Ok(Stamp::from(&crate::directory::stat_of(&*self.file)?) == self.stamp)
    }

    /// Whether `dest` is this version.
    pub(crate) fn is_at(&self, dest: &Destination) -> io::Result<bool> {
        let entry = dest.dir.entry(&dest.name)?;
        Ok(entry.is_some_and(|entry| entry.is_file() && Stamp::from(&entry) == self.stamp))
    }

    /// Locks the file, so that of several writers that are to replace it only one looks whether it
    /// is there and replaces it at a time.
    ///
    /// Such a writer holds the lock for a moment. `None` where the file system has no locks.
    ///
    /// # Errors
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) where another program holds it for longer than that.
    pub(crate) fn lock_for_commit(&self) -> io::Result<Option<Unlock<'_>>> {
        const TRIES: u32 = 1000;
        const PAUSE: Duration = Duration::from_millis(1);
        for _ in 0..TRIES {
            match try_lock(&self.file) {
                Ok(Lock::Held) => return Ok(Some(Unlock(&self.file))),
                Ok(Lock::Taken) => thread::sleep(PAUSE),
                // Over NFS, a file must be open for writing to be locked.
                Ok(Lock::Unsupported(_)) | Err(_) => return Ok(None),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another program holds a lock on the file that is to be replaced: end it, or let it \
             unlock the file",
        ))
    }
}
