//! Directories that appear under their name when they are complete.
//!
//! A directory is written under a hidden name beside its own, and locked until it is renamed or
//! removed. A run that is killed leaves it, and [`sweep`] removes it: one that is not locked has no
//! writer.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{UnlinkatFlags, unlinkat};
use sparse_file::FileIdentity;
use tempfile::TempDir;

use crate::save::dir_of;

const PREFIX: &str = ".ramsnap-";
/// The number of random characters after the prefix.
const RANDOM: usize = 6;
/// How often a directory is made that a sweep removes before it is locked.
const TRIES: usize = 16;

/// A directory that is written.
pub struct StagedDir {
    dir: TempDir,
    /// Locked until it is closed.
    _lock: File,
}

impl StagedDir {
    /// Makes an empty directory beside `path`.
    pub fn beside(path: &Path) -> io::Result<Self> {
        for _ in 0..TRIES {
            let mut builder = tempfile::Builder::new();
            let dir = builder.prefix(PREFIX).rand_bytes(RANDOM);
            let dir = dir.tempdir_in(dir_of(path))?;
            match lock(dir.path())? {
                Locked::Yes(lock) => return Ok(Self { dir, _lock: lock }),
                // A sweep has it, or has removed it.
                Locked::InUse | Locked::Gone => {}
                // No sweep removes it there.
                Locked::NoLocks(lock, _) => return Ok(Self { dir, _lock: lock }),
            }
        }
        Err(io::Error::other("a sweep removes each staged directory"))
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Renames the directory, which must be complete and durable.
    pub fn rename(self, path: &Path) -> io::Result<()> {
        fs::rename(self.dir.path(), path)?;
        // It has another name now.
        let _ = self.dir.keep();
        Ok(())
    }
}

/// The staged directories that were found in a directory.
#[derive(Debug, Default)]
pub struct Swept {
    pub removed: Vec<PathBuf>,
    pub in_use: Vec<PathBuf>,
    pub kept: Vec<(PathBuf, io::Error)>,
}

/// Removes the staged directories in `dir` that have no writer, or only lists them. `files` are the
/// names that a writer gives to files: a directory with others is kept.
pub fn sweep(dir: &Path, files: &[&str], removes: bool) -> io::Result<Swept> {
    let mut swept = Swept::default();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !(is_name(entry.file_name().as_encoded_bytes())
            && entry.file_type().is_ok_and(|kind| kind.is_dir()))
        {
            continue;
        }
        let path = entry.path();
        match lock(&path) {
            Ok(Locked::InUse) => swept.in_use.push(path),
            Ok(Locked::Gone) => {}
            Ok(Locked::NoLocks(_, error)) | Err(error) => swept.kept.push((path, error)),
            Ok(Locked::Yes(lock)) => match remove(&path, &lock, files, removes) {
                Ok(()) => swept.removed.push(path),
                Err(error) => swept.kept.push((path, error)),
            },
        }
    }
    Ok(swept)
}

fn is_name(name: &[u8]) -> bool {
    let random = name.strip_prefix(PREFIX.as_bytes());
    random.is_some_and(|it| it.len() == RANDOM && it.iter().all(u8::is_ascii_alphanumeric))
}

enum Locked {
    Yes(File),
    InUse,
    /// There is no such directory any more.
    Gone,
    /// The file system has no locks.
    NoLocks(File, io::Error),
}

fn lock(path: &Path) -> io::Result<Locked> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let opened = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path);
    let dir = match opened {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Locked::Gone),
        Err(error) => return Err(error),
    };
    match dir.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Locked::InUse),
        Err(TryLockError::Error(error)) => return Ok(Locked::NoLocks(dir, error)),
    }
    // It may have been renamed or removed before it was locked.
    let is_it = match FileIdentity::at(path) {
        Ok(at) => FileIdentity::of(&dir)?.may_be(&at),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    Ok(if is_it {
        Locked::Yes(dir)
    } else {
        Locked::Gone
    })
}

/// Removes a locked directory. Only names inside of it are removed, also if another user exchanges
/// it meanwhile.
fn remove(path: &Path, dir: &File, files: &[&str], removes: bool) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        if !files.iter().any(|file| name == *file) {
            return Err(io::Error::other("it has other files than a snapshot"));
        }
        names.push(name);
    }
    if removes {
        for name in names {
            unlinkat(dir, name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
        }
        fs::remove_dir(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep_all(dir: &Path) -> Swept {
        sweep(dir, &["a", "b"], true).unwrap()
    }

    #[test]
    fn only_directories_without_a_writer_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let staged = StagedDir::beside(&dir.path().join("x")).unwrap();
        fs::write(staged.path().join("a"), "").unwrap();
        let at = staged.path().to_owned();
        let swept = sweep_all(dir.path());
        assert_eq!((swept.in_use, swept.removed.len()), (vec![at.clone()], 0));
        // As a run that was killed leaves it.
        let StagedDir { dir: left, _lock } = staged;
        let _ = left.keep();
        drop(_lock);
        let listed = sweep(dir.path(), &["a", "b"], false).unwrap();
        assert_eq!(listed.removed, std::slice::from_ref(&at));
        assert!(at.exists());
        assert_eq!(sweep_all(dir.path()).removed, std::slice::from_ref(&at));
        assert!(!at.exists());
    }

    #[test]
    fn other_files_and_directories_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            ".ramsnap-longer1",
            ".ramsnap-a.b.c.",
            "ramsnap-abcdef",
            ".ramsnap-012345",
        ] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let other = dir.path().join(".ramsnap-012345");
        for name in ["a", "notes"] {
            fs::write(other.join(name), "").unwrap();
        }
        fs::write(dir.path().join(".ramsnap-abcdef"), "").unwrap();
        std::os::unix::fs::symlink(&other, dir.path().join(".ramsnap-link00")).unwrap();
        let swept = sweep_all(dir.path());
        assert_eq!((swept.removed.len(), swept.kept.len()), (0, 1));
        assert!(swept.kept[0].1.to_string().contains("other files"));
        assert!(other.join("a").exists());
    }

    #[test]
    fn a_renamed_directory_is_no_longer_staged() {
        let dir = tempfile::tempdir().unwrap();
        let staged = StagedDir::beside(&dir.path().join("x")).unwrap();
        fs::write(staged.path().join("a"), "").unwrap();
        staged.rename(&dir.path().join("x")).unwrap();
        assert!(sweep_all(dir.path()).removed.is_empty());
        assert!(dir.path().join("x/a").exists());
    }
}
