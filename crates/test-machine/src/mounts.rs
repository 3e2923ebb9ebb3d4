//! File systems mounted for one test and unmounted when the guard drops.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A tmpfs of a few bytes, to fill up.
#[derive(Debug)]
pub struct TinyTmpfs(Mounted);

impl TinyTmpfs {
    /// Mounts a tmpfs of `bytes` bytes (rounded up to a page by the kernel) in a new temporary directory.
    ///
    /// # Errors
    /// Whatever `mount(2)` says, `EPERM` without `CAP_SYS_ADMIN`.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let options = format!("size={bytes},mode=0777");
        Mounted::new(|dir| {
            mount(
                Some("tmpfs"),
                dir,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(options.as_str()),
            )
        })
        .map(Self)
    }

    /// The mounted directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl AsRef<Path> for TinyTmpfs {
    fn as_ref(&self) -> &Path {
        self.path()
    }
}

/// A read-only view of a directory: what a permission bit cannot do to root.
#[derive(Debug)]
pub struct ReadOnlyBind(Mounted);

impl ReadOnlyBind {
    /// Binds `source`, read-only, to a new temporary directory.
    ///
    /// # Errors
    /// Whatever `mount(2)` says, `EPERM` without `CAP_SYS_ADMIN`.
    pub fn of(source: &Path) -> io::Result<Self> {
        let bind = MsFlags::MS_BIND;
        let mounted =
            Mounted::new(|dir| mount(Some(source), dir, None::<&str>, bind, None::<&str>))?;
        let read_only = bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(
            None::<&str>,
            mounted.path(),
            None::<&str>,
            read_only,
            None::<&str>,
        )?;
        Ok(Self(mounted))
    }

    /// The mounted directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A mount point in a directory of its own; lazily unmounted, then removed.
#[derive(Debug)]
pub(crate) struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    pub(crate) fn new<E: Into<io::Error>>(
        attach: impl FnOnce(&Path) -> Result<(), E>,
    ) -> io::Result<Self> {
        let dir = tempfile::tempdir()?;
        attach(dir.path()).map_err(Into::into)?;
        Ok(Self { dir: dir.keep() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazy: a failing test may still hold files open. The directory goes only once nothing is mounted on it.
        if umount2(&self.dir, MntFlags::MNT_DETACH).is_ok() {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}
