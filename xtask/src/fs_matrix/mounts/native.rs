//! Linux: what this machine's own kernel mounts.

use anyhow::{Context, bail};
use test_machine::{LoopFs, LoopMount, TinyTmpfs};

use super::{Mount, elsewhere, kernel};
use crate::fs_matrix::kind::Kind;
use crate::packages::Package;

/// What it takes to make the images and to look at the checks' system calls.
pub const PACKAGES: &[Package] = &[
    Package::new("e2fsprogs", "mkfs.ext4"),
    Package::new("xfsprogs", "mkfs.xfs"),
    Package::new("btrfs-progs", "mkfs.btrfs"),
    Package::new("strace", "strace"),
];

pub fn mount(kind: Kind) -> anyhow::Result<Mount> {
    let fs = match kind {
        Kind::Ext4 => LoopFs::Ext4,
        Kind::Xfs => LoopFs::Xfs,
        Kind::Btrfs => LoopFs::Btrfs,
        Kind::Tmpfs => return tmpfs(),
        _ => bail!("{kind} is mounted in the guest"),
    };
    let image = || LoopMount::new(fs).with_context(|| format!("can't mount {kind}"));
    let (main, small) = (image()?, image()?);
    let (elsewhere, guard) = elsewhere()?;
    Ok(Mount {
        dir: main.path().to_owned(),
        small: Some(small.path().to_owned()),
        elsewhere,
        driver: kernel(),
        guards: vec![Box::new(main), Box::new(small), guard],
    })
}

fn tmpfs() -> anyhow::Result<Mount> {
    let (main, small) = (TinyTmpfs::new(512 << 20)?, TinyTmpfs::new(24 << 20)?);
    // A tmpfs is another file system to a second tmpfs.
    let (elsewhere, guard) = elsewhere()?;
    Ok(Mount {
        dir: main.path().to_owned(),
        small: Some(small.path().to_owned()),
        elsewhere,
        driver: kernel(),
        guards: vec![Box::new(main), Box::new(small), guard],
    })
}
