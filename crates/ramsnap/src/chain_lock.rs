//! The locks that keep two runs of the tool from changing the images of a directory at once.
//!
//! A verb that replaces or removes images on which others build holds the `flock` of their
//! directories exclusively. A verb that writes a diff on them holds it shared. The kernel releases
//! it when the process ends.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::save::dir_of;
use crate::session::Session;

/// Who else may use the images meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Verbs that write diffs.
    Shared,
    /// No verb that changes or needs them.
    Exclusive,
}

/// Locked directories.
#[derive(Debug)]
#[must_use = "the locks are released when this is dropped"]
pub struct ChainLock {
    _dirs: Vec<File>,
}

impl ChainLock {
    /// Locks the directories of files, and those that links lead to. Waits for another run, and
    /// says so. Locks nothing on a file system without locks.
    pub fn take(session: &Session, files: &[PathBuf], sharing: Sharing) -> anyhow::Result<Self> {
        let dirs = dirs_of(files.iter().map(PathBuf::as_path)).into_iter();
        let dirs = dirs.map(|dir| lock(session, &dir, sharing));
        let dirs = dirs.collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self {
            _dirs: dirs.into_iter().flatten().collect(),
        })
    }
}

/// Returns the directories of files, and those that links lead to, in the order in which all runs
/// lock them.
pub fn dirs_of<'p>(files: impl IntoIterator<Item = &'p Path>) -> BTreeSet<PathBuf> {
    let of_file = |file: &Path| {
        let target = file.canonicalize().ok();
        let target = target.and_then(|file| Some(file.parent()?.to_owned()));
        [dir_of(file).canonicalize().ok(), target]
    };
    files.into_iter().flat_map(of_file).flatten().collect()
}

/// Locks a directory, or returns `None` where that is not supported or not permitted.
fn lock(session: &Session, dir: &Path, sharing: Sharing) -> anyhow::Result<Option<File>> {
    let Ok(file) = File::open(dir) else {
        return Ok(None);
    };
    let (tried, wait): (_, fn(&File) -> io::Result<()>) = match sharing {
        Sharing::Shared => (file.try_lock_shared(), File::lock_shared),
        Sharing::Exclusive => (file.try_lock(), File::lock),
    };
    match tried {
        Ok(()) => {}
        Err(TryLockError::Error(_)) => return Ok(None),
        Err(TryLockError::WouldBlock) => {
            session.warn(&format!(
                "another process has locked {dir:?}, such as a run of ramsnap that uses its images: waiting until it has ended"
            ));
            wait(&file).with_context(|| format!("cannot lock {dir:?}"))?;
        }
    }
    Ok(Some(file))
}
