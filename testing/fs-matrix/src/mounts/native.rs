//! Linux: what this machine's own kernel mounts.

use std::path::Path;

use ::file_systems::{LoopMount, Overlay, Storage, TinyTmpfs};
use anyhow::{Context, bail};
use harness::packages::Package;
use harness::{file_systems, kernel};

use super::{Images, Mount, elsewhere};
use crate::kind::{self, Kind, Place, place};

/// Returns what it takes to make the images and to look at the checks' system calls.
pub(crate) fn packages() -> Vec<Package> {
    let here = kind::here().filter(|kind| place(kind) == Place::Here);
    let mut packages = file_systems::packages(here);
    packages.push(Package::new("strace", "strace"));
    packages
}

pub(crate) fn mount(kind: Kind, images: &Images) -> anyhow::Result<Mount> {
    let image = |fs, name| {
        let image = images.file(&format!("{}-{name}", kind.name))?;
        LoopMount::on_image(fs, image).with_context(|| format!("can't mount {kind}"))
    };
    match kind.storage {
        Storage::Disk(_) => of(image(kind, "main")?, image(kind, "small")?),
        Storage::Memory => of(TinyTmpfs::new(512 << 20)?, TinyTmpfs::new(24 << 20)?),
        Storage::Overlay(below) => {
            let [main, small] = ["main", "small"].map(|name| image(below, name));
            of(Stacked::on(main?)?, Stacked::on(small?)?)
        }
        Storage::Nfs { .. } => bail!("{kind} is mounted in the guest"),
    }
}

/// An overlayfs whose layers are on a file system of its own.
struct Stacked {
    // Before what is below it: unmounted first.
    overlay: Overlay,
    _below: LoopMount,
}

impl Stacked {
    fn on(below: LoopMount) -> anyhow::Result<Self> {
        let overlay = Overlay::within(below.path()).context("can't mount overlayfs")?;
        Ok(Self {
            overlay,
            _below: below,
        })
    }
}

impl AsRef<Path> for Stacked {
    fn as_ref(&self) -> &Path {
        self.overlay.path()
    }
}

/// The mounts to check and to fill up, and one that is another file system to both.
fn of<M: AsRef<Path> + Send + 'static>(main: M, small: M) -> anyhow::Result<Mount> {
    let (elsewhere, guard) = elsewhere()?;
    Ok(Mount {
        dir: main.as_ref().to_owned(),
        small: Some(small.as_ref().to_owned()),
        elsewhere,
        driver: kernel(),
        guards: vec![Box::new(main), Box::new(small), guard],
    })
}
