//! Open files with a name in a directory, and locks on existing ones.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::rename::{PublishError, confirm_rename};
use crate::stat::{FileId, Stat, stat_of};
use crate::sys::{Lock, Unlock, try_lock};

/// An existing file, locked until this is dropped. Its name belongs to another owner, and stays.
///
/// [`StagedFile::from`](crate::staged_file::StagedFile) takes over the name.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct LockedFile(NamedFile);

impl LockedFile {
    /// Locks a file that was opened by `name`. Returns `None` if another process holds the lock or
    /// the name refers to another file by now.
    pub(crate) fn lock(dir: &Arc<Directory>, name: &OsStr, file: File) -> io::Result<Option<Self>> {
        if !matches!(try_lock(&file)?, Lock::Held) {
            return Ok(None);
        }
        let mut named = NamedFile::new(dir, name, file)?;
        named.set_locked();
        Ok(named.check_linked()?.then_some(Self(named)))
    }

    pub(crate) fn name(&self) -> &OsStr {
        self.0.name()
    }

    pub(crate) fn file(&self) -> &File {
        self.0.file()
    }

    /// Returns the file, which stays locked.
    pub(crate) fn into_named(self) -> NamedFile {
        self.0
    }
}

/// The `flock` of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileLock {
    Held,
    /// Not acquired, or the file system has no locks.
    NotHeld,
}

/// An open file and its name in a directory. Drop releases its lock and keeps its name.
#[derive(Debug)]
pub(crate) struct NamedFile {
    dir: Arc<Directory>,
    name: OsString,
    path: PathBuf,
    file: File,
    id: FileId,
    lock: FileLock,
}

impl NamedFile {
    /// Returns a file that is not locked.
    pub(crate) fn new(dir: &Arc<Directory>, name: &OsStr, file: File) -> io::Result<Self> {
        Ok(Self {
            dir: Arc::clone(dir),
            path: dir.path_of(name),
            name: name.to_owned(),
            id: stat_of(&file)?.id,
            file,
            lock: FileLock::NotHeld,
        })
    }

    /// Records that this open file holds the lock, so that drop releases it.
    pub(crate) fn set_locked(&mut self) {
        self.lock = FileLock::Held;
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.lock == FileLock::Held
    }

    pub(crate) fn dir(&self) -> &Arc<Directory> {
        &self.dir
    }

    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    /// Records that the file was renamed to `name` in `dir`.
    pub(crate) fn set_name(&mut self, dir: &Arc<Directory>, name: &OsStr) {
        self.dir = Arc::clone(dir);
        self.path = dir.path_of(name);
        self.name = name.to_owned();
    }

    /// Returns whether the name still refers to this file. Errors count as `false`.
    pub(crate) fn is_linked(&self) -> bool {
        self.check_linked().is_ok_and(|ours| ours)
    }

    /// Returns whether the name still refers to this file.
    pub(crate) fn check_linked(&self) -> io::Result<bool> {
        Ok(self.dir.entry(&self.name)?.map(|entry| entry.id) == Some(self.id))
    }

    /// Fails unless both the descriptor and the name still refer to the file that was opened.
    pub(crate) fn check(&self) -> io::Result<Stat> {
        let stat = stat_of(&self.file)?;
        if stat.id != self.id {
            return Err(io::Error::other(
                "the writer's `File` was replaced by another one",
            ));
        }
        if !self.check_linked()? {
            return Err(io::Error::new(
                ErrorKind::NotFound,
                "another program removed or replaced the staged file",
            ));
        }
        Ok(stat)
    }

    /// Makes a `call` that renames the file to `name` in `dir`, and determines whether it took
    /// effect.
    pub(crate) fn attempt(
        &self,
        dir: &Directory,
        name: &OsStr,
        call: impl Fn(&Directory, &OsStr) -> nix::Result<()>,
    ) -> Result<(), PublishError> {
        let moved = || call(&self.dir, &self.name);
        confirm_rename(moved, || self.is_at(dir, name), || self.is_linked())
    }

    /// Returns whether `name` in `dir` refers to this file.
    pub(crate) fn is_at(&self, dir: &Directory, name: &OsStr) -> io::Result<bool> {
        let Some(entry) = dir.entry(name)? else {
            return Ok(false);
        };
        let own = stat_of(&self.file)?;
        Ok((entry.id, entry.size) == (own.id, own.size))
    }

    /// Removes the name, if it still refers to this file.
    pub(crate) fn remove(&self) -> Result<(), Leftover> {
        let removed = match self.check_linked() {
            // Another program replaced the file: the name is not its own any more.
            Ok(false) => Ok(()),
            // If the check fails, rely on the protocol: this writer holds the lock.
            Ok(true) | Err(_) => self.dir.remove(&self.name),
        };
        removed.map_err(|source| Leftover {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for NamedFile {
    fn drop(&mut self) {
        if self.is_locked() {
            drop(Unlock(&self.file));
        }
    }
}
