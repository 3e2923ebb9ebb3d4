//! A mount namespace of a program's own.

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

use crate::process::this_program;

/// Enters a mount namespace of its own: what is mounted from here on ends with this process and its
/// children, also when they are killed. To be called before the first thread is started.
///
/// # Errors
///
/// Fails in a chroot whose directory is not a mount point: mounts in it could appear outside.
pub fn keep_private() -> anyhow::Result<()> {
    // Afterwards it cannot be found in a chroot: it was started from a mount of the old namespace.
    this_program()?;
    unshare(CloneFlags::CLONE_NEWNS).context("can't enter a mount namespace")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    match nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>) {
        Err(Errno::EINVAL) => bail!(
            "the root directory is not a mount point, so mounts can't be kept private: before \
             `chroot DIR`, run `mount --bind DIR DIR`"
        ),
        done => done.context("can't keep mounts private"),
    }
}
