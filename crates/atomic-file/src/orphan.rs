//! Orphaned staged files: detection and removal.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

use crate::directory::Directory;
use crate::records::Records;
use crate::retry::retry;
use crate::stat::{FileId, Stat, stat_of};
use crate::sys::{Lock, Unlock, may_rename_in_sticky, try_lock};

/// The result of inspecting a staged file that may be orphaned.
#[derive(Debug)]
pub(crate) enum Inspection {
    Removed,
    Missing,
    InUse,
    Retained(io::Error),
}

/// Removes the staged file `name` if it is orphaned. Never waits, and never changes a file that is
/// in use.
pub(crate) fn remove_if_orphaned(dir: &Directory, name: &OsStr) -> Inspection {
    let orphan = match Orphan::lock(dir, name) {
        Ok(orphan) => orphan,
        Err(inspected) => return inspected,
    };
    let mut records = Records::default();
    let looked = stat_of(&orphan.file).and_then(|stat| records.refresh(dir, Some(stat.uid)));
    match looked {
        Ok(()) => orphan.resolve(dir, name, &records, true),
        Err(error) => Inspection::Retained(error),
    }
}

fn or_retained(result: io::Result<Inspection>) -> Inspection {
    match result {
        Ok(inspected) => inspected,
        Err(error) if error.kind() == ErrorKind::NotFound => Inspection::Missing,
        Err(error) => Inspection::Retained(error),
    }
}

/// A staged file that was not locked by its writer, locked until this is dropped.
#[derive(Debug)]
pub(crate) struct Orphan {
    file: File,
    id: FileId,
}

impl Drop for Orphan {
    fn drop(&mut self) {
        drop(Unlock(&self.file));
    }
}

impl Orphan {
    /// Locks the staged file `name`, or returns why it must not be removed.
    pub(crate) fn lock(dir: &Directory, name: &OsStr) -> Result<Self, Inspection> {
        let attempt = || {
            match dir.entry(name)? {
                None => return Ok(Err(Inspection::Missing)),
                Some(entry) if !entry.is_file() => {
                    return Ok(Err(retained(
                        "has the name of a staged file, but is not a regular \
                         file",
                    )));
                }
                Some(_) => {}
            }
            let file = dir.open_file(name)?;
            let id = stat_of(&file)?.id;
            Ok(match try_lock(&file)? {
                Lock::Held => Ok(Self { file, id }),
                Lock::Taken => Err(Inspection::InUse),
                Lock::Unsupported(error) => Err(Inspection::Retained(error)),
            })
        };
        attempt().unwrap_or_else(|error| Err(or_retained(Err(error))))
    }

    /// Returns the identity of the file.
    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// Removes the staged file if `remove` is set, and returns the result that removing it has or
    /// would have. `records` must have been refreshed since the file was locked.
    pub(crate) fn resolve(
        self,
        dir: &Directory,
        name: &OsStr,
        records: &Records,
        remove: bool,
    ) -> Inspection {
        let attempt = || -> io::Result<Inspection> {
            let stat = stat_of(&self.file)?;
            if records.name(name, stat.uid) {
                return Ok(retained(
                    "a group commit that names it is pending in the directory: call `recover`",
                ));
            }
            if dir.entry(name)?.map(|entry| entry.id) != Some(stat.id) {
                return Ok(Inspection::Missing);
            }
            if remove {
                dir.remove(name)?;
            } else {
                check_removable(dir, name, &stat)?;
            }
            Ok(Inspection::Removed)
        };
        or_retained(attempt())
    }
}

/// Fails with the error of the system if it is known not to let this process remove the file.
fn check_removable(dir: &Directory, name: &OsStr, file: &Stat) -> io::Result<()> {
    const STICKY: u32 = 0o1000;
    let access = AccessFlags::W_OK | AccessFlags::X_OK;
    retry(|| faccessat(dir, ".", access, AtFlags::AT_EACCESS))?;
    let (of_dir, of_file) = (dir.restrictions(OsStr::new("")), dir.restrictions(name));
    let is_protected = [of_dir, of_file]
        .iter()
        .any(|found| found.immutable || found.append_only);
    let is_sticky = dir.stat.mode & STICKY != 0;
    if is_protected || (is_sticky && !may_rename_in_sticky(file, &dir.stat)) {
        return Err(Errno::EPERM.into());
    }
    if of_file.mount_point {
        return Err(Errno::EBUSY.into());
    }
    Ok(())
}

fn retained(reason: &'static str) -> Inspection {
    Inspection::Retained(io::Error::other(reason))
}
