//! Staged files: creation, locking, renaming and removal.
//!
//! # Names and locks
//! The name of a staged file is `.atomic-file-HASH-ID.stage`. HASH is the CRC-32 of the
//! destination's name, so that the name has a fixed length. ID is 16 random hexadecimal digits, so
//! that no other user can predict and occupy the name. `open` lists the directory and removes the
//! orphaned staged files of its own destination.
//!
//! A writer holds the `flock` of its staged file from just after its creation until it is renamed
//! or removed. The mode is 0600 until all bytes are synced, so that no other user can open the file
//! and hold its lock. The commit then sets the final mode and owner, and syncs the file again. Two
//! rules close the gap between creating and locking:
//!
//! 1. After locking the file, its creator verifies that the name still refers to it, and chooses
//!    another name if not. If the file is already locked, the creator waits: a sweeper holds the
//!    lock briefly, and keeps the file if a record names it.
//! 2. A staged file is unlinked only under its lock: by its writer, or by a sweeper. The sweeper
//!    verifies, *after* locking, first that no published group record names the file and then that
//!    the name still refers to the locked file.
//!
//! A file that a commit [exchanged](StagedFile::exchange) for its staged file has the staged file's
//! name and is locked by that commit. `recycle.rs` describes the next steps.
//!
//! Only the holder of the lock can change what a name refers to, so a sweeper's last check holds
//! until it unlinks the file. A writer that died publishes no more records, which is why the
//! sweeper checks the records first.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::directory::Directory;
use crate::error::Leftover;
use crate::locked_file::{LockedFile, NamedFile};
use crate::names::{NameKind, new_id, protocol_name};
use crate::orphan::{Inspection, remove_if_orphaned};
use crate::rename::{PublishError, confirm_rename, has_no_such_call};
use crate::stat::Stat;
use crate::sys::{Lock, try_lock};

/// The mode of every staged file until the commit: no other user can open it.
pub(crate) const STAGED_MODE: u32 = 0o600;

/// Locks a file that was just created. A sweeper may hold the lock briefly; it will release or
/// unlink.
fn lock_new(file: &File) -> io::Result<Lock> {
    const TRIES: u32 = 100;
    const PAUSE: Duration = Duration::from_millis(1);
    for _ in 0..TRIES {
        match try_lock(file)? {
            Lock::Taken => thread::sleep(PAUSE),
            answered => return Ok(answered),
        }
    }
    Ok(Lock::Taken)
}

/// Whether drop removes the name of a staged file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnDrop {
    /// The name belongs to the staged file.
    Remove,
    /// The file was renamed to its destination, is left for a recovery, or the name belongs to
    /// another process.
    Keep,
}

/// A file under a staged name of its own, which drop removes.
#[derive(Debug)]
#[must_use = "the staged file is removed when this is dropped"]
pub(crate) struct StagedFile {
    named: NamedFile,
    on_drop: OnDrop,
}

impl From<LockedFile> for StagedFile {
    /// Takes over the name: drop removes it.
    fn from(locked: LockedFile) -> Self {
        Self {
            named: locked.into_named(),
            on_drop: OnDrop::Remove,
        }
    }
}

impl StagedFile {
    /// Creates an empty staged file of mode 0600 for the destination name `dest`.
    pub(crate) fn create(dir: &Arc<Directory>, dest: &OsStr) -> io::Result<Self> {
        let mut kind = NameKind::Locked;
        loop {
            let name = protocol_name(dest, new_id()?, kind);
            let file = match dir.create_new(&name) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    // The name is random: this process created the file, and the reply was lost.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    continue;
                }
                Err(error) => {
                    // Over NFS the reply may have been lost and the file exist. It is not locked,
                    // so it is orphaned.
                    let _: Inspection = remove_if_orphaned(dir, &name);
                    return Err(error);
                }
            };
            // The file's identity is unknown only here. Its name was just created, so it refers to
            // it.
            let named =
                NamedFile::new(dir, &name, file).inspect_err(|_| drop(dir.remove(&name)))?;
            let mut staged = Self {
                named,
                on_drop: OnDrop::Remove,
            };
            if kind == NameKind::Unlocked {
                return Ok(staged);
            }
            match lock_new(staged.file())? {
                Lock::Held if staged.named.check_linked()? => {
                    staged.named.set_locked();
                    return Ok(staged);
                }
                // A sweeper locked the file first, or another program holds the lock: the name no
                // longer belongs to this writer.
                Lock::Held | Lock::Taken => staged.on_drop = OnDrop::Keep,
                // Dropping the staged file removes it.
                Lock::Unsupported(_) => kind = NameKind::Unlocked,
            }
        }
    }

    /// Renames the file within its directory to a new staged name for `dest`.
    pub(crate) fn move_to_staged_name(&mut self, dest: &OsStr) -> io::Result<()> {
        self.move_to(&protocol_name(dest, new_id()?, NameKind::Locked))
    }

    /// Renames the file within its directory to the random name `name`.
    pub(crate) fn rename_to(&mut self, name: OsString) -> Result<(), PublishError> {
        let dir = Arc::clone(self.dir());
        self.publish(&dir, &name, false)?;
        self.moved_to(&dir, &name);
        Ok(())
    }

    /// Renames the file within its directory to `name`, which must not exist.
    pub(crate) fn move_to(&mut self, name: &OsStr) -> io::Result<()> {
        let dir = Arc::clone(self.dir());
        self.named
            .attempt(&dir, name, |from, own| from.rename_new(own, &dir, name))
            .map_err(PublishError::of_rename)?;
        self.named.set_name(&dir, name);
        Ok(())
    }

    /// Exchanges the staged file with `old`, which is in the same directory. Returns `old` as the
    /// owner of the staged file's name. This object gives up its name.
    ///
    /// The name may refer to a file other than `old`, if that was replaced just before the call.
    /// [`is_linked`](Self::is_linked) detects this.
    pub(crate) fn exchange(&mut self, old: LockedFile) -> Result<Self, PublishError> {
        let (dir, dest) = (Arc::clone(self.dir()), old.name().to_owned());
        self.named
            .attempt(&dir, &dest, |_, own| dir.exchange(own, &dest))?;
        self.on_drop = OnDrop::Keep;
        // The destination became a directory just before the call, which rename(2) would have
        // refused.
        if let Ok(Some(there)) = dir.entry(self.name())
            && there.is_dir()
        {
            let is_dir = || io::Error::from(ErrorKind::IsADirectory);
            return Err(match dir.exchange(self.name(), &dest) {
                Ok(()) => {
                    self.on_drop = OnDrop::Remove;
                    PublishError::NotPublished(is_dir())
                }
                Err(errno) => PublishError::Unknown {
                    rename: is_dir(),
                    look: errno.into(),
                },
            });
        }
        let mut old = Self::from(old);
        old.named.set_name(&dir, self.name());
        Ok(old)
    }

    pub(crate) fn dir(&self) -> &Arc<Directory> {
        self.named.dir()
    }

    pub(crate) fn name(&self) -> &OsStr {
        self.named.name()
    }

    pub(crate) fn path(&self) -> &Path {
        self.named.path()
    }

    pub(crate) fn file(&self) -> &File {
        self.named.file()
    }

    pub(crate) fn file_mut(&mut self) -> &mut File {
        self.named.file_mut()
    }

    /// Returns whether the file system has locks, so that a sweep can tell whether the file is in
    /// use.
    pub(crate) fn is_locked(&self) -> bool {
        self.named.is_locked()
    }

    /// Returns whether the name still refers to this file. Errors count as `false`.
    pub(crate) fn is_linked(&self) -> bool {
        self.named.is_linked()
    }

    /// Fails unless both the descriptor and the name still refer to the file that was created.
    pub(crate) fn check(&self) -> io::Result<Stat> {
        self.named.check()
    }

    /// Renames the staged file to `name` in `dir`. Replaces an existing file unless `no_clobber` is
    /// set.
    ///
    /// `Ok` means that `name` refers to the staged file. It contains a [`Leftover`] if the staged
    /// file's old name remains.
    pub(crate) fn publish(
        &mut self,
        dir: &Directory,
        name: &OsStr,
        no_clobber: bool,
    ) -> Result<Option<Leftover>, PublishError> {
        if !no_clobber {
            self.named
                .attempt(dir, name, |from, own| from.rename(own, dir, name))?;
            self.on_drop = OnDrop::Keep;
            return Ok(None);
        }
        match self
            .named
            .attempt(dir, name, |from, own| from.rename_new(own, dir, name))
        {
            Ok(()) => {
                self.on_drop = OnDrop::Keep;
                Ok(None)
            }
            Err(PublishError::NotPublished(error)) if has_no_such_call(&error) => {
                let link = || self.dir().link(self.name(), dir, name);
                // The old name exists in any case, so it does not show whether the link was made.
                confirm_rename(link, || self.named.is_at(dir, name), || false)?;
                Ok(self.remove().err())
            }
            Err(error) => Err(error),
        }
    }

    /// Records that the file was renamed to `name` in `dir`, and makes drop remove that name.
    pub(crate) fn moved_to(&mut self, dir: &Arc<Directory>, name: &OsStr) {
        self.named.set_name(dir, name);
        self.on_drop = OnDrop::Remove;
    }

    /// Makes drop keep the file's name, for a recovery.
    pub(crate) fn disarm(&mut self) {
        self.on_drop = OnDrop::Keep;
    }

    /// Removes the staged file.
    pub(crate) fn discard(mut self) -> Result<(), Leftover> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), Leftover> {
        match std::mem::replace(&mut self.on_drop, OnDrop::Keep) {
            OnDrop::Keep => Ok(()),
            OnDrop::Remove => self.named.remove(),
        }
    }
}

impl Drop for StagedFile {
    /// Removes the name while the lock is held, which is released after this.
    fn drop(&mut self) {
        // `discard` reports errors. A sweep removes a file that remains.
        let _ = self.remove();
    }
}
