//! A directory held by descriptor: all calls refer to this directory, also after its path changes.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
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
    /// Whether other users may create files, determined on first use.
    shared: OnceLock<bool>,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const OPEN_DIR: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

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
        let fd = retry(|| openat(base, at, OPEN_DIR, Mode::empty()))?;
        let stat = stat_of(&fd)?;
        Ok(Self {
            fd,
            path: shown,
            stat,
            shared: OnceLock::new(),
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
        *self
            .shared
            .get_or_init(|| permissions::others_may_create(self.as_fd(), &self.stat))
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
        retry(|| openat(self, name, OPEN_FILE | access, Mode::empty())).map(File::from)
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

    pub(crate) fn sync(&self, durability: Durability) -> io::Result<()> {
        sys::sync(self, durability)
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

fn os_string(name: &CStr) -> OsString {
    OsStr::from_bytes(name.to_bytes()).to_owned()
}

fn c_string(name: &OsStr) -> nix::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| Errno::EINVAL)
}
