//! macOS: disk images by `hdiutil`, and an export of this machine to itself. Type-checked, never
//! run.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use file_systems::MacOs;
use harness::kernel;
use harness::packages::Package;
use tempfile::{NamedTempFile, TempDir};

use super::{Images, Mount, elsewhere};
use crate::kind::Kind;

/// Returns nothing: macOS has all of it on board.
pub(crate) fn packages() -> Vec<Package> {
    Vec::new()
}

pub(crate) fn mount(kind: Kind, images: &Images) -> anyhow::Result<Mount> {
    let fs = match kind.macos {
        Some(MacOs::Image(fs)) => fs,
        Some(MacOs::Nfs) => return nfs(),
        None => bail!("{kind} cannot be mounted on macOS"),
    };
    let (main, small) = (
        Image::new(images, fs, "8g")?,
        Image::new(images, fs, "64m")?,
    );
    let (elsewhere, guard) = elsewhere()?;
    Ok(Mount {
        dir: main.point.path().to_owned(),
        small: Some(small.point.path().to_owned()),
        elsewhere,
        driver: kernel(),
        guards: vec![Box::new(main), Box::new(small), guard],
    })
}

/// An attached sparse disk image; detached when dropped.
struct Image {
    point: TempDir,
    _image: NamedTempFile,
}

impl Image {
    fn new(images: &Images, fs: &str, size: &str) -> anyhow::Result<Self> {
        let (image, point) = (images.file(fs)?, tempfile::tempdir()?);
        let create = [
            "create",
            "-quiet",
            "-ov",
            "-type",
            "SPARSE",
            "-volname",
            "fs-matrix",
        ];
        run(Command::new("hdiutil")
            .args(create)
            .args(["-size", size, "-fs", fs])
            .arg(image.path()))?;
        run(Command::new("hdiutil")
            .args(["attach", "-quiet", "-nobrowse", "-mountpoint"])
            .arg(point.path())
            .arg(image.path()))?;
        Ok(Self {
            point,
            _image: image,
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let detach = [OsStr::new("detach"), OsStr::new("-force")];
        let _ = run(Command::new("hdiutil").args(detach).arg(self.point.path()));
    }
}

const EXPORTS: &str = "/etc/exports";

/// A directory exported to this machine alone, and mounted; the list of exports is as it was once
/// this is dropped.
struct Export {
    point: TempDir,
    _dir: TempDir,
    exports_before: Option<String>,
}

fn nfs() -> anyhow::Result<Mount> {
    let export = Export::new()?;
    let (elsewhere, guard) = elsewhere()?;
    Ok(Mount {
        dir: export.point.path().to_owned(),
        small: None,
        elsewhere,
        driver: kernel(),
        guards: vec![Box::new(export), guard],
    })
}

impl Export {
    fn new() -> anyhow::Result<Self> {
        let (dir, point) = (tempfile::tempdir()?, tempfile::tempdir()?);
        // /tmp and /var are links, and nfsd wants the path behind them.
        let real = dir.path().canonicalize()?;
        let exports_before = Path::new(EXPORTS)
            .exists()
            .then(|| fs::read_to_string(EXPORTS))
            .transpose()
            .with_context(|| format!("can't read {EXPORTS}"))?;
        let line = format!(
            "{} -maproot=root -network 127.0.0.0 -mask 255.0.0.0\n",
            real.display()
        );
        let exports = exports_before.clone().unwrap_or_default() + &line;
        // From here on dropping restores it.
        let export = Self {
            point,
            _dir: dir,
            exports_before,
        };
        fs::write(EXPORTS, exports).with_context(|| format!("can't write {EXPORTS}"))?;
        run(Command::new("nfsd").arg("enable"))?;
        run(Command::new("nfsd").arg("update"))?;
        run(Command::new("mount")
            .args(["-t", "nfs", "-o", "vers=3,tcp,resvport,hard"])
            .arg(format!("localhost:{}", real.display()))
            .arg(export.point.path()))?;
        Ok(export)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-f").arg(self.point.path()));
        let _ = match &self.exports_before {
            Some(exports) => fs::write(EXPORTS, exports),
            None => fs::remove_file(EXPORTS),
        };
        let _ = run(Command::new("nfsd").arg("update"));
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        bail!(
            "{} failed: {}",
            command.get_program().display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
