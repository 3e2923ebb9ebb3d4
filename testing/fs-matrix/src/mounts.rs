//! "Give me a mounted directory of this kind": the one thing that differs between Linux, the guest,
//! and macOS.

#[cfg(any(target_os = "macos", test))]
mod macos;
#[cfg(target_os = "linux")]
mod native;

use std::any::Any;
use std::path::{Path, PathBuf};

use harness::kernel;
#[cfg(target_os = "linux")]
use tempfile::NamedTempFile;

#[cfg(target_os = "macos")]
pub(crate) use macos::{mount, packages};
#[cfg(target_os = "linux")]
pub(crate) use native::{mount, packages};

/// A mounted directory; unmounted when dropped.
pub(crate) struct Mount {
    pub dir: PathBuf,
    pub small: Option<PathBuf>,
    pub elsewhere: PathBuf,
    /// Whose code runs.
    pub driver: String,
    /// What unmounts when it is dropped.
    #[expect(dead_code, reason = "only to be dropped")]
    guards: Vec<Box<dyn Any + Send>>,
}

/// Where disk images are made, and whether they stay.
pub(crate) struct Images {
    pub dir: PathBuf,
    pub keep: bool,
}

impl Images {
    /// A new, empty image file.
    #[cfg(target_os = "linux")]
    fn file(&self, name: &str) -> anyhow::Result<NamedTempFile> {
        std::fs::create_dir_all(&self.dir)?;
        let mut options = tempfile::Builder::new();
        options.prefix(name).suffix(".img");
        let mut file = options.tempfile_in(&self.dir)?;
        file.disable_cleanup(self.keep);
        Ok(file)
    }

    /// A new directory for one image.
    #[cfg(any(target_os = "macos", test))]
    fn dir_for(&self, name: &str) -> anyhow::Result<tempfile::TempDir> {
        std::fs::create_dir_all(&self.dir)?;
        let mut dir = tempfile::Builder::new()
            .prefix(name)
            .tempdir_in(&self.dir)?;
        dir.disable_cleanup(self.keep);
        Ok(dir)
    }
}

impl Mount {
    /// A directory that the user has mounted already: nothing of it is small enough to be filled.
    pub(crate) fn of_user(dir: &Path) -> anyhow::Result<Self> {
        let room = tempfile::Builder::new()
            .prefix("fs-matrix-")
            .tempdir_in(dir)?;
        let (elsewhere, guard) = elsewhere()?;
        Ok(Self {
            dir: room.path().to_owned(),
            small: None,
            elsewhere,
            driver: format!("{}, on {}", dir.display(), kernel()),
            guards: vec![Box::new(room), guard],
        })
    }
}

/// A directory on a file system of its own.
#[cfg(target_os = "linux")]
fn elsewhere() -> anyhow::Result<(PathBuf, Box<dyn Any + Send>)> {
    if let Ok(tmpfs) = test_machine::TinyTmpfs::new(16 << 20) {
        return Ok((tmpfs.path().to_owned(), Box::new(tmpfs)));
    }
    // Who may not mount has this one.
    let dir = tempfile::tempdir_in("/dev/shm")?;
    Ok((dir.path().to_owned(), Box::new(dir)))
}

/// A directory on a file system of its own, as long as what is checked is an image.
#[cfg(not(target_os = "linux"))]
fn elsewhere() -> anyhow::Result<(PathBuf, Box<dyn Any + Send>)> {
    let dir = tempfile::tempdir()?;
    Ok((dir.path().to_owned(), Box::new(dir)))
}
