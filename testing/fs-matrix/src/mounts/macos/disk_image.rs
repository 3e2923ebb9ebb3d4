//! A disk image, made and attached by `hdiutil`.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, bail};
use tempfile::TempDir;

use super::super::Images;
use super::system::System;

/// The number of tries before a detach is forced: Spotlight opens new volumes for a moment.
const TRIES: usize = 5;

/// A sparse disk image that is attached, and detached when this is dropped.
pub(super) struct DiskImage {
    system: System,
    /// The whole disk, such as `/dev/disk4`.
    device: String,
    point: TempDir,
    /// Of the image file alone.
    _dir: TempDir,
}

impl DiskImage {
    /// Makes an image of `size` (in the units of `hdiutil`) with the file system `fs`, and attaches
    /// it.
    pub(super) fn attach(
        system: &System,
        images: &Images,
        fs: &str,
        size: &str,
    ) -> anyhow::Result<Self> {
        let dir = images.dir_for(fs)?;
        let name = dir.path().join("disk");
        let create = ["create", "-type", "SPARSE", "-volname", "fs-matrix"];
        let create = create.into_iter().chain(["-size", size, "-fs", fs]);
        let create = create.map(OsStr::new).chain([name.as_os_str()]);
        system.run("hdiutil", create)?;
        let image = only_file(dir.path())?;

        let point = tempfile::tempdir()?;
        let attach = ["attach", "-nobrowse", "-owners", "on", "-mountpoint"];
        let attach = attach.into_iter().map(OsStr::new);
        let attach = attach.chain([point.path().as_os_str(), image.as_os_str()]);
        let attached = system.run("hdiutil", attach)?;
        // The first line is of the whole disk, and the others are of its partitions and volumes.
        let device = attached.split_whitespace().next();
        let Some(device) = device.filter(|device| device.starts_with("/dev/")) else {
            bail!("hdiutil attach printed no device: {attached:?}");
        };
        Ok(Self {
            system: system.clone(),
            device: device.to_owned(),
            point,
            _dir: dir,
        })
    }

    pub(super) fn mount_point(&self) -> &Path {
        self.point.path()
    }

    fn detach(&self) -> anyhow::Result<()> {
        for _ in 0..TRIES {
            if self.system.run("hdiutil", ["detach", &self.device]).is_ok() {
                return Ok(());
            }
            thread::sleep(self.system.pause);
        }
        let force = ["detach", "-force", &self.device];
        self.system.run("hdiutil", force).map(drop)
    }
}

impl Drop for DiskImage {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("warning: {} stays attached: {error:#}", self.device);
        }
    }
}

/// Returns the only file of a directory: `hdiutil` appends `.sparseimage` to the name of an image.
fn only_file(dir: &Path) -> anyhow::Result<PathBuf> {
    let files: Result<Vec<_>, _> = fs::read_dir(dir)?.collect();
    match files?.as_slice() {
        [file] => Ok(file.path()),
        files => Err(anyhow::anyhow!("{} files", files.len()))
            .with_context(|| format!("hdiutil create made no single image in {}", dir.display())),
    }
}
