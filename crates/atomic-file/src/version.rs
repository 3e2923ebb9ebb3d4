//! Versions of a file, for commits that replace only the version that was read.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;

use crate::destination::Destination;
use crate::stat::{FileId, Stat, stat_of};
use crate::sys::{self, Lock, Unlock, try_lock};

/// A version of a file: its identity and its state when it was read.
///
/// A writer with [`AtomicWriterOptions::replace_only`](crate::AtomicWriterOptions::replace_only)
/// replaces only this version. A file that another writer has committed since stays.
///
/// A version is identified by device, inode, size and time of modification. The file is kept open,
/// so that its inode number is not reused and no writer
/// [recycles](crate::AtomicWriterOptions::recycle) it. Changes of its mode, owner, attributes and
/// links do not make it another version.
///
/// # Limitations
///
/// A file that is replaced by another one is always detected. A write to the same file in place
/// that keeps its size is detected by the time of modification only, because the kernel does not
/// report its change counter (`STATX_CHANGE_COOKIE`) to programs. The following writes in place
/// are therefore missed:
/// - One in the same step of the file system's clock as the previous write. On ext4, XFS, btrfs
///   and tmpfs since Linux 6.13, a write after the time was read always changes it. Before, and on
///   other file systems, a step is 1 to 10 milliseconds; it is a second or two on FAT, ext3 and
///   some network file systems.
/// - One after which the program restores the time of modification (`utimensat(2)`).
/// - A store to a shared mapping whose page was already writable: the kernel sets the time at the
///   first store after the page was written back.
/// - On Linux, one between the comparison and the rename by a program that already had the file
///   open for writing. Other programs cannot open it for writing between the two: the commit holds
///   a read lease, if it may (the user owns the file or has `CAP_LEASE`, and the file system has
///   leases). Without a lease, and on other systems, any write between the two calls is missed.
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
///     Err(CommitError::DestinationChanged { .. }) => {
///         println!("another writer committed first: read the file again");
///     }
///     Err(other) => return Err(other.into()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FileVersion {
    file: Arc<File>,
    stamp: Stamp,
}

/// The identity of a version.
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
    /// Returns the version of `file` with this `metadata`, which must have been read from `file`
    /// before its bytes.
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

    /// Returns whether the open file is still this version: it was not resized or written to.
    ///
    /// # Errors
    /// Returns the errors of `fstat(2)`.
    pub fn is_current(&self) -> io::Result<bool> {
        Ok(Stamp::from(&stat_of(&*self.file)?) == self.stamp)
    }

    /// Returns whether `dest` is this version.
    pub(crate) fn is_at(&self, dest: &Destination) -> io::Result<bool> {
        let entry = dest.dir.entry(&dest.name)?;
        Ok(entry.is_some_and(|entry| entry.is_file() && Stamp::from(&entry) == self.stamp))
    }

    /// Locks the file, so that writers that replace the same version compare and rename one at a
    /// time.
    ///
    /// A writer holds the lock only briefly. The file is opened again: a lock belongs to the open
    /// file, which clones of a version share. Returns `None` if the file system has no locks, or if
    /// `dest` is another file.
    ///
    /// # Errors
    /// Returns [`WouldBlock`](io::ErrorKind::WouldBlock) if another process holds the lock for
    /// longer. Every user who may read the file can hold it.
    pub(crate) fn lock_for_commit(&self, dest: &Destination) -> io::Result<Option<CommitLock>> {
        const TRIES: u32 = 1000;
        const PAUSE: Duration = Duration::from_millis(1);
        let file = match dest.dir.open_for(OFlag::O_RDONLY, &dest.name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // Its mode has changed since it was read.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.file.try_clone()?
            }
            Err(error) => return Err(error),
        };
        if stat_of(&file)?.id != self.stamp.id {
            return Ok(None);
        }
        for _ in 0..TRIES {
            match try_lock(&file) {
                Ok(Lock::Held) => {
                    return Ok(Some(CommitLock {
                        file,
                        leased: false,
                    }));
                }
                Ok(Lock::Taken) => thread::sleep(PAUSE),
                // Over NFS, a file must be open for writing to be locked.
                Ok(Lock::Unsupported(_)) | Err(_) => return Ok(None),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another process holds a lock (flock) on the file to be replaced: end that process, or \
             make it unlock the file (`lslocks` lists it); a command that `flock FILE` runs cannot \
             replace that FILE, so let `flock` lock another file",
        ))
    }
}

/// The lock of a file that is about to be replaced; released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct CommitLock {
    file: File,
    leased: bool,
}

impl CommitLock {
    /// Keeps other programs from opening the file for writing, if this process may. Not possible if
    /// a program already has it open for writing.
    pub(crate) fn exclude_writers(&mut self) {
        self.leased = sys::lease_for_reading(&self.file);
    }
}

impl Drop for CommitLock {
    fn drop(&mut self) {
        if self.leased {
            sys::release_lease(&self.file);
        }
        drop(Unlock(&self.file));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::Symlinks;

    #[test]
    fn clones_of_a_version_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dest");
        std::fs::write(&path, "old").unwrap();
        let file = Arc::new(File::open(&path).unwrap());
        let version = FileVersion::new(Arc::clone(&file), &file.metadata().unwrap());
        let dest = Destination::resolve(&path, Symlinks::Follow).unwrap();
        let lock = version.lock_for_commit(&dest).unwrap();
        if lock.is_none() {
            return test_machine::not_run("clones_of_a_version", "there are no locks");
        }
        let other = version.clone().lock_for_commit(&dest).unwrap_err();
        assert_eq!(other.kind(), io::ErrorKind::WouldBlock);
        drop(lock);
        assert!(version.clone().lock_for_commit(&dest).unwrap().is_some());
    }
}
