//! Linux: what this machine's own kernel mounts.

use std::path::Path;

use anyhow::{Context, bail};
use harness::kernel;
use harness::packages::Package;
use test_machine::{LoopFs, LoopMount, Overlay, TinyTmpfs};

use super::{Images, Mount, elsewhere};
use crate::kind::Kind;

/// What it takes to make the images and to look at the checks' system calls.
pub(crate) const PACKAGES: &[Package] = &[
    Package::new("e2fsprogs", "mkfs.ext4"),
    Package::new("xfsprogs", "mkfs.xfs"),
    Package::new("btrfs-progs", "mkfs.btrfs"),
    Package::new("strace", "strace"),
];

pub(crate) fn mount(kind: Kind, images: &Images) -> anyhow::Result<Mount> {
    let fs = match kind {
        Kind::Ext4 => LoopFs::Ext4,
        Kind::Xfs => LoopFs::Xfs,
        Kind::Btrfs => LoopFs::Btrfs,
        Kind::Tmpfs => return of(TinyTmpfs::new(512 << 20)?, TinyTmpfs::new(24 << 20)?),
        Kind::Overlay => LoopFs::Ext4,
        _ => bail!("{kind} is mounted in the guest"),
    };
    let image = |name| {
        let image = images.file(&format!("{}-{name}", kind.name()))?;
        LoopMount::on_image(fs, image).with_context(|| format!("can't mount {kind}"))
    };
    let (main, small) = (image("main")?, image("small")?);
    match kind {
        Kind::Overlay => of(Stacked::on(main)?, Stacked::on(small)?),
        _ => of(main, small),
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
