//! File systems on loop devices: made, mounted, and gone when the guards drop.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use file_systems::{Disk, FileSystem, Journal, LoopDevice};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Returns what `fs` is on a disk.
pub(super) fn disk(fs: &FileSystem) -> anyhow::Result<&Disk> {
    fs.disk().with_context(|| format!("{fs} is not on a disk"))
}

/// Returns whether `fs` promises what the library builds on.
pub(super) fn promises(fs: &FileSystem) -> bool {
    fs.disk().is_some_and(|disk| disk.survives_power_loss)
}

/// For a file system that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system mounted on a directory.
pub(super) struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    pub(super) fn new(fs: &FileSystem, device: &LoopDevice, dir: &Path) -> anyhow::Result<Self> {
        Self::with(fs, Journal::AsUsual, device, dir)
    }

    pub(super) fn with(
        fs: &FileSystem,
        journal: Journal,
        device: &LoopDevice,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        disk(fs)?.mount(device, journal, dir)?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns when the driver has let go of the device: another file system may be put there.
    pub(super) fn unmount(self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            match umount2(&self.dir, MntFlags::empty()) {
                // FUSE closes files a moment after the process that had them open.
                Err(Errno::EBUSY) if start.elapsed() < PATIENCE => {
                    thread::sleep(Duration::from_millis(2));
                }
                result => {
                    result.with_context(|| format!("can't unmount {}", self.dir.display()))?;
                    std::mem::forget(self);
                    return Ok(());
                }
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}
