//! A directory held by descriptor: whatever happens to its path meanwhile, every call below means this directory.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use crate::options::Durability;
use crate::permissions;
use crate::sys::{self, retry};

/// Which file it is, as long as the file system stays mounted and the file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// What this crate needs of `stat(2)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stat {
    pub(crate) id: FileId,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) links: u64,
    /// In bytes.
    pub(crate) allocated: u64,
    /// When it was last written to: seconds since 1970, and nanoseconds.
    pub(crate) modified: (i64, i64),
}

impl Stat {
    fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.mode as libc::mode_t) & SFlag::S_IFMT
    }

    pub(crate) fn is_file(&self) -> bool {
        self.kind() == SFlag::S_IFREG
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind() == SFlag::S_IFDIR
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.kind() == SFlag::S_IFLNK
    }
}

// The fields' types differ between systems: what is a conversion here is none there.
#[allow(clippy::unnecessary_cast)]
impl From<FileStat> for Stat {
    fn from(stat: FileStat) -> Self {
        Self {
            id: FileId {
                device: stat.st_dev as u64,
                inode: stat.st_ino as u64,
            },
            size: stat.st_size as u64,
            mode: stat.st_mode as u32,
            uid: stat.st_uid as u32,
            gid: stat.st_gid as u32,
            links: stat.st_nlink as u64,
            // In units of 512 bytes, whatever the block size of the file system.
            allocated: (stat.st_blocks as u64).saturating_mul(512),
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        }
    }
}

/// `stat(2)` of an open file or directory.
pub(crate) fn stat_of(fd: impl AsFd) -> io::Result<Stat> {
    let fd = fd.as_fd();
    retry(|| fstat(fd)).map(Stat::from)
}

#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    /// As it was called when opened, for messages and paths to show; empty for the current directory.
    path: PathBuf,
    pub(crate) stat: Stat,
    /// Looked up once, where somebody asks.
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

/// `O_NONBLOCK`, so that not even a FIFO put there a moment ago could hold us up.
const OPEN_FILE: OFlag = OFlag::O_NOFOLLOW
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_NONBLOCK);

impl Directory {
    /// Opens `path`, the empty path (parent of a bare file name) being the current directory.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_from(nix::fcntl::AT_FDCWD, path, path.to_owned())
    }

    /// Opens `path`, relative to this directory; what symbolic links mean.
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

    /// What to call the directory in a message.
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

    /// What stands at `name`, not following it; `None` where nothing does.
    pub(crate) fn entry(&self, name: &OsStr) -> io::Result<Option<Stat>> {
        match retry(|| fstatat(self, name, AtFlags::AT_SYMLINK_NOFOLLOW)) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What tells the file at `name` from all others that have its inode number, before or after:
    /// when it was created, in nanoseconds since 1970; where the file system keeps no such time, a
    /// digest of its handle, with the highest bit set; 0 where there is neither. Nothing changes it
    /// later.
    pub(crate) fn generation(&self, name: &OsStr) -> io::Result<u64> {
        sys::generation(self, name)
    }

    /// What the system says against replacing `name`, or, where that is empty, against renaming
    /// anything in this directory.
    pub(crate) fn restrictions(&self, name: &OsStr) -> sys::Restrictions {
        c_string(name).map_or_else(
            |_| sys::Restrictions::default(),
            |name| sys::restrictions(self, &name),
        )
    }

    /// Whether others than the directory's owner and root may create files in it: see
    /// [`others_may_write`](crate::others_may_write).
    pub(crate) fn others_may_create(&self) -> bool {
        *self
            .shared
            .get_or_init(|| permissions::others_may_create(self.as_fd(), &self.stat))
    }

    /// Creates `name`, readable and writable by its owner alone. `EEXIST` whatever stands there, a link included.
    pub(crate) fn create_new(&self, name: &OsStr) -> io::Result<File> {
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        retry(|| openat(self, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)).map(File::from)
    }

    /// Opens the file at `name`, to lock it and to read it. For writing where that is allowed: NFS asks for it
    /// before it locks.
    pub(crate) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        self.open_for(OFlag::O_RDWR, name)
            .or_else(|_| self.open_for(OFlag::O_RDONLY, name))
    }

    pub(crate) fn open_for(&self, access: OFlag, name: &OsStr) -> io::Result<File> {
        retry(|| openat(self, name, OPEN_FILE | access, Mode::empty())).map(File::from)
    }

    /// One attempt: whether an interrupted or failed rename happened is for the caller to find out.
    pub(crate) fn rename(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        nix::fcntl::renameat(self, from, to, name)
    }

    /// As [`rename`](Self::rename), but never replaces: `EEXIST`.
    pub(crate) fn rename_new(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        sys::rename_new(self, &c_string(from)?, to, &c_string(name)?)
    }

    /// One attempt, as with [`rename`](Self::rename). Both names exist before and after, or nothing changes.
    pub(crate) fn exchange(&self, one: &OsStr, other: &OsStr) -> nix::Result<()> {
        sys::exchange(self, &c_string(one)?, &c_string(other)?)
    }

    /// One attempt, as with [`rename`](Self::rename). `EEXIST` where `name` exists.
    pub(crate) fn link(&self, from: &OsStr, to: &Self, name: &OsStr) -> nix::Result<()> {
        linkat(self, from, to, name, AtFlags::empty())
    }

    /// Removes `name`; not an error where it is gone already.
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

    /// Through "." and not a duplicate: a descriptor of its own has a position of its own.
    pub(crate) fn open_to_list(&self) -> io::Result<OwnedFd> {
        retry(|| openat(self, ".", OPEN_DIR, Mode::empty()))
    }

    /// The names in the directory that begin with `prefix`, in the file system's order.
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
