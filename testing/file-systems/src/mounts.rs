//! Mounts file systems for one test and unmounts them when the guard is dropped.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A small tmpfs that a test can fill up.
#[derive(Debug)]
pub struct TinyTmpfs(Mounted);

impl TinyTmpfs {
    /// Mounts a tmpfs of `bytes` bytes (rounded up to a page by the kernel) in a new temporary
    /// directory.
    ///
    /// # Errors
    /// Those of `mount(2)`: `EPERM` without `CAP_SYS_ADMIN`.
    pub fn new(bytes: u64) -> io::Result<Self> {
        Self::with(&format!("size={bytes},mode=0777"))
    }

    /// Mounts a tmpfs that stores files in huge pages if possible.
    ///
    /// # Errors
    /// As [`new`](Self::new); `EINVAL` if the kernel does not support huge pages for tmpfs.
    pub fn of_huge_pages(bytes: u64) -> io::Result<Self> {
        Self::with(&format!("size={bytes},mode=0777,huge=always"))
    }

    fn with(options: &str) -> io::Result<Self> {
        Mounted::new(|dir| {
            mount(
                Some("tmpfs"),
                dir,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(options),
            )
        })
        .map(Self)
    }

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A hugetlbfs in pages of 2 MiB.
#[derive(Debug)]
pub struct HugeFs(Mounted);

impl HugeFs {
    /// Mounts a hugetlbfs in a new temporary directory, limited to `bytes` bytes of pages if given.
    ///
    /// # Errors
    /// Those of `mount(2)`: `EPERM` without `CAP_SYS_ADMIN`.
    pub fn new(bytes: Option<u64>) -> io::Result<Self> {
        let size = bytes.map_or(String::new(), |bytes| format!(",size={bytes}"));
        let options = format!("pagesize=2M{size}");
        let none = MsFlags::empty();
        Mounted::new(|dir| {
            mount(
                Some("hugetlbfs"),
                dir,
                Some("hugetlbfs"),
                none,
                Some(options.as_str()),
            )
        })
        .map(Self)
    }

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns whether this number of pages can be allocated now.
    #[must_use]
    pub fn has_pages(&self, pages: u64) -> bool {
        let path = self.path().join("probe");
        let allocated = File::create(&path).and_then(|file| {
            let len = i64::try_from(pages << 21).map_err(io::Error::other)?;
            Ok(fallocate(&file, FallocateFlags::empty(), 0, len)?)
        });
        let _ = std::fs::remove_file(path);
        allocated.is_ok()
    }
}

impl AsRef<Path> for TinyTmpfs {
    fn as_ref(&self) -> &Path {
        self.path()
    }
}

/// A read-only view of a directory. Applies to root too, unlike permission bits.
#[derive(Debug)]
pub struct ReadOnlyBind(Mounted);

impl ReadOnlyBind {
    /// Binds `source`, read-only, to a new temporary directory.
    ///
    /// # Errors
    /// Those of `mount(2)`: `EPERM` without `CAP_SYS_ADMIN`.
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

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// An overlayfs of two directories. The upper one receives all writes.
#[derive(Debug)]
pub struct Overlay {
    // Before its layers, so that it is unmounted first.
    mounted: Mounted,
    _layers: Option<tempfile::TempDir>,
}

impl Overlay {
    /// Mounts `upper` over `lower`. The kernel uses `work`, an empty directory on the file system
    /// of `upper`.
    ///
    /// # Errors
    /// Those of `mount(2)`: `EPERM` without `CAP_SYS_ADMIN`, `EINVAL` if the kernel cannot use one
    /// of the directories, `ENODEV` if it does not support overlayfs.
    pub fn of(lower: &Path, upper: &Path, work: &Path) -> io::Result<Self> {
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let mounted = Mounted::new(|dir| {
            mount(
                Some("overlay"),
                dir,
                Some("overlay"),
                MsFlags::empty(),
                Some(options.as_str()),
            )
        })?;
        Ok(Self {
            mounted,
            _layers: None,
        })
    }

    /// Mounts an overlay of two new, empty directories in `dir`, as in a new container.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn within(dir: &Path) -> io::Result<Self> {
        let layers = tempfile::Builder::new()
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir_in(dir)?;
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| layers.path().join(name));
        for dir in [&lower, &upper, &work] {
            std::fs::create_dir(dir)?;
        }
        Ok(Self {
            _layers: Some(layers),
            ..Self::of(&lower, &upper, &work)?
        })
    }

    /// Returns the mount point, with the merged directories.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mounted.path()
    }
}

/// A mount point in a directory of its own, lazily unmounted and removed on drop.
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
        // Unmount lazily, because a failed test may still have files open. Remove the directory
        // only if nothing is mounted on it.
        if umount2(&self.dir, MntFlags::MNT_DETACH).is_ok() {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}
