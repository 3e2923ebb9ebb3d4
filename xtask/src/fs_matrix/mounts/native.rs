//! Linux: what this machine's own kernel mounts.

use std::path::Path;

use anyhow::{Context, bail};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use test_machine::{LoopFs, LoopMount, TinyTmpfs};

use super::{Images, Mount, elsewhere, kernel};
use crate::fs_matrix::kind::Kind;
use crate::packages::Package;

/// What it takes to make the images and to look at the checks' system calls.
pub const PACKAGES: &[Package] = &[
    Package::new("e2fsprogs", "mkfs.ext4"),
    Package::new("xfsprogs", "mkfs.xfs"),
    Package::new("btrfs-progs", "mkfs.btrfs"),
    Package::new("strace", "strace"),
];

/// Whatever is mounted from here on is this process's and its children's, and goes with them, also when they are killed. To be called
/// before the first thread is started.
pub fn keep_private() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
}

pub fn mount(kind: Kind, images: &Images) -> anyhow::Result<Mount> {
    let fs = match kind {
        Kind::Ext4 => LoopFs::Ext4,
        Kind::Xfs => LoopFs::Xfs,
        Kind::Btrfs => LoopFs::Btrfs,
        Kind::Tmpfs => return of(TinyTmpfs::new(512 << 20)?, TinyTmpfs::new(24 << 20)?),
        _ => bail!("{kind} is mounted in the guest"),
    };
    let image = |name| {
        let image = images.file(&format!("{}-{name}", kind.name()))?;
        LoopMount::on_image(fs, image).with_context(|| format!("can't mount {kind}"))
    };
    of(image("main")?, image("small")?)
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
