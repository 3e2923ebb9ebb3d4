//! A directory held by descriptor: all calls refer to this directory, also after its path changes.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::durability::Durability;
use crate::permissions;
use crate::retry::retry;
use crate::stat::{Stat, stat_of};
use crate::sys;

#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    /// The path at the time of opening, for messages; empty for the current directory.
    path: PathBuf,
    pub(crate) stat: Stat,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const OPEN_DIR: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// Replaces the error of opening a regular file without waiting, which only a lease causes.
fn name_lease(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::WouldBlock {
        return error;
    }
    io::Error::new(
        io::ErrorKind::WouldBlock,
        "another program holds a lease on it, which it was asked to release: try again, at the \
         latest after the seconds in /proc/sys/fs/lease-break-time",
    )
}

/// `O_NONBLOCK`, so that opening a FIFO does not block.
const OPEN_FILE: OFlag = OFlag::O_NOFOLLOW
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_NONBLOCK);

impl Directory {
    /// Opens `path`. The empty path (the parent of a bare file name) is the current directory.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_from(nix::fcntl::AT_FDCWD, path, path.to_owned())
    }

    /// Opens `path` relative to this directory, as for the target of a symbolic link.
    pub(crate) fn open_below(&self, path: &Path) -> io::Result<Self> {
        Self::open_from(self.as_fd(), path, self.path.join(path))
    }

    fn open_from(base: BorrowedFd<'_>, path: &Path, shown: PathBuf) -> io::Result<Self> {
        let at = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let fd = match steps(at) {
            (first, None) => retry(|| openat(base, first, OPEN_DIR, Mode::empty()))?,
            (first, Some(rest)) => open_by_steps(base, first, rest)?,
        };
        let stat = stat_of(&fd)?;
        Ok(Self {
            fd,
            path: shown,
            stat,
        })
    }

    /// Returns the path of the directory for a message.
    pub(crate) fn path(&self) -> &Path {
        if self.path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &self.path
        }
    }

    pub(crate) fn path_of(&self, name: &OsStr) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the entry `name`, without following a link; `None` if it does not exist.
    pub(crate) fn entry(&self, name: &OsStr) -> io::Result<Option<Stat>> {
        match retry(|| fstatat(self, name, AtFlags::AT_SYMLINK_NOFOLLOW)) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns a number that distinguishes the file at `name` from all earlier and later files with
    /// its inode number. It is the time of creation in nanoseconds since 1970. If the file system
    /// stores no such time, it is a digest of the file's handle with the highest bit set. It is 0
    /// if there is neither. It never changes.
    pub(crate) fn generation(&self, name: &OsStr) -> io::Result<u64> {
        sys::generation(self, name)
    }

    /// Returns the attributes that forbid replacing `name` or, if that is empty, renaming files in
    /// this directory.
    pub(crate) fn restrictions(&self, name: &OsStr) -> sys::Restrictions {
        c_string(name).map_or_else(
            |_| sys::Restrictions::default(),
            |name| sys::restrictions(self, &name),
        )
    }

    /// Returns whether users other than the directory's owner and root may create files in it: see
    /// [`others_may_write`](crate::others_may_write).
    pub(crate) fn others_may_create(&self) -> bool {
        permissions::others_may_create(&self.stat)
    }

    /// Creates `name`, readable and writable by its owner alone. Fails with `EEXIST` if the name
    /// exists, also as a link.
    pub(crate) fn create_new(&self, name: &OsStr) -> io::Result<File> {
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        retry(|| openat(self, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)).map(File::from)
    }

    /// Opens the file at `name` for locking and reading. Opens it for writing too if that is
    /// allowed: NFS requires it for locking.
    pub(crate) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        self.open_for(OFlag::O_RDWR, name)
            .or_else(|_| self.open_for(OFlag::O_RDONLY, name))
    }

    pub(crate) fn open_for(&self, access: OFlag, name: &OsStr) -> io::Result<File> {
        let opened = retry(|| openat(self, name, OPEN_FILE | access, Mode::empty()));
        opened.map(File::from).map_err(name_lease)
    }

    /// Makes one attempt. The caller determines whether an interrupted or failed rename took
    /// effect.
    pub(crate) fn rename(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        nix::fcntl::renameat(self, from, to, name)
    }

    /// Renames like [`rename`](Self::rename), but fails with `EEXIST` instead of replacing.
    pub(crate) fn rename_new(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        sys::rename_new(self, &c_string(from)?, to, &c_string(name)?)
    }

    /// Exchanges two names, in one attempt like [`rename`](Self::rename). Both names exist before
    /// and after, or nothing changes.
    pub(crate) fn exchange(&self, one: &OsStr, other: &OsStr) -> nix::Result<()> {
        sys::exchange(self, &c_string(one)?, &c_string(other)?)
    }

    /// Makes a hard link, in one attempt like [`rename`](Self::rename). Fails with `EEXIST` if
    /// `name` exists.
    pub(crate) fn link(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        linkat(self, from, to, name, AtFlags::empty())
    }

    /// Removes `name`. Succeeds if it does not exist.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        match retry(|| unlinkat(self, name, UnlinkatFlags::NoRemoveDir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    pub(crate) fn read_link(&self, name: &OsStr) -> io::Result<PathBuf> {
        retry(|| nix::fcntl::readlinkat(self, name)).map(PathBuf::from)
    }

    /// Returns whether the link `name` leads to an open file rather than to the path in its text.
    pub(crate) fn is_magic_link(&self, name: &OsStr) -> io::Result<bool> {
        sys::is_magic_link(self, name)
    }

    /// Returns the file at `name`, to which the kernel follows links.
    pub(crate) fn followed(&self, name: &OsStr) -> io::Result<Stat> {
        retry(|| fstatat(self, name, AtFlags::empty())).map(Stat::from)
    }

    pub(crate) fn sync(&self, durability: Durability) -> io::Result<()> {
        sys::sync(self, durability)?;
        // XFS shuts down after an error of its log. It then returns no error for the sync of a
        // directory, and EIO for its attributes.
        match durability {
            Durability::Full | Durability::Barrier => retry(|| fstat(self)).map(drop),
            Durability::None => Ok(()),
        }
    }

    /// Opens the directory again through ".". A duplicate of the descriptor would share its
    /// position.
    pub(crate) fn open_to_list(&self) -> io::Result<OwnedFd> {
        retry(|| openat(self, ".", OPEN_DIR, Mode::empty()))
    }

    /// Returns the names in the directory that begin with `prefix`, in the file system's order.
    pub(crate) fn names(&self, prefix: &str) -> io::Result<Vec<OsString>> {
        let names = sys::names(self.open_to_list()?, prefix)?;
        Ok(names.iter().map(|name| os_string(name)).collect())
    }
}

/// The longest path of a system call, in bytes: `PATH_MAX` without the final NUL.
const MAX_PATH: usize = libc::PATH_MAX as usize - 1;

/// Splits a path that is too long for one system call into a first part that is not, and the rest.
fn steps(path: &Path) -> (&Path, Option<&Path>) {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() <= MAX_PATH {
        return (path, None);
    }
    let of = |bytes| Path::new(OsStr::from_bytes(bytes));
    match bytes[..=MAX_PATH].iter().rposition(|byte| *byte == b'/') {
        // A slash at the start is part of the first step; those after it are not of the rest.
        Some(slash) => {
            let rest = &bytes[slash..];
            let skipped = rest.iter().take_while(|byte| **byte == b'/').count();
            match (&bytes[..slash.max(1)], &rest[skipped..]) {
                (first, []) => (of(first), None),
                (first, rest) => (of(first), Some(of(rest))),
            }
        }
        // One name is too long: the system call fails.
        None => (path, None),
    }
}

/// Opens a directory whose path is too long for one system call.
fn open_by_steps(base: BorrowedFd<'_>, first: &Path, mut rest: &Path) -> io::Result<OwnedFd> {
    // Only search permission is needed on the directories in between.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const THROUGH: OFlag = OFlag::O_PATH.union(OPEN_DIR);
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const THROUGH: OFlag = OPEN_DIR;
    let mut dir = retry(|| openat(base, first, THROUGH, Mode::empty()))?;
    loop {
        let (next, after) = steps(rest);
        let flags = if after.is_some() { THROUGH } else { OPEN_DIR };
        dir = retry(|| openat(&dir, next, flags, Mode::empty()))?;
        match after {
            Some(after) => rest = after,
            None => return Ok(dir),
        }
    }
}

fn os_string(name: &CStr) -> OsString {
    OsStr::from_bytes(name.to_bytes()).to_owned()
}

fn c_string(name: &OsStr) -> nix::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// As after an error of the log, between a rename and the sync of its directory.
    #[cfg(target_os = "linux")]
    #[test]
    fn sync_on_an_xfs_that_was_shut_down_is_an_error() {
        use test_machine::{FileSystem, LoopMount, needs};

        needs!(Mount(FileSystem::XFS));
        let mount = LoopMount::new(FileSystem::XFS).expect("mounted");
        let dir = Directory::open(mount.path()).expect("opened");
        std::fs::write(mount.path().join("a"), "new").expect("written");
        std::fs::rename(mount.path().join("a"), mount.path().join("b")).expect("renamed");
        let mut shutdown = test_machine::tool("xfs_io");
        let shutdown = shutdown.args(["-x", "-c", "shutdown"]).arg(mount.path());
        assert!(shutdown.status().expect("xfs_io runs").success());
        dir.sync(Durability::Full)
            .expect_err("the name may be lost");
    }

    #[rstest]
    fn a_long_path_is_split_between_names(
        #[values(9, 255)] name: usize,
        #[values(1, 15, 16, 100, 4096)] count: usize,
        #[values("/", "/./")] separator: &str,
        #[values("", "//")] start: &str,
    ) {
        let names = vec!["n".repeat(name); count];
        let path = format!("{start}{}", names.join(separator));
        let mut found = Vec::new();
        let (mut parts, mut rest) = (0, Some(Path::new(&path)));
        while let Some(path) = rest {
            let (first, after) = steps(path);
            assert!(first.as_os_str().len() <= MAX_PATH);
            assert_eq!(first.is_absolute(), parts == 0 && !start.is_empty());
            let names = first.iter().map(|name| name.to_str().unwrap().to_owned());
            found.extend(names.filter(|name| name != "/" && name != "."));
            parts += 1;
            rest = after;
        }
        assert_eq!(found, names);
        assert_eq!(parts > 1, path.len() > MAX_PATH);
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error() {
        let long = "n".repeat(2 * MAX_PATH);
        let error = Directory::open(Path::new(&long)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}
