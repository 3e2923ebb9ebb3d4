//! The lock that prevents RAM from being read and restored at once.
//!
//! `restore` into existing RAM holds it exclusively, and readers of RAM hold it shared. It is an
//! `fcntl` lock (`F_OFD_SETLK`) of one byte at a fixed offset far behind the end of any RAM. It is
//! therefore never confused with a lock of the VMM, which may hold any `flock` or lock any part of
//! the file that it uses.
//!
//! A VMM that has locked *all* of the file with `fcntl`, to the largest offset, conflicts with this
//! lock. The VMM owns its RAM, so this is not an error: ramsnap then does not detect that RAM is
//! read and restored at once.
//!
//! Any process that may read the RAM can take the shared lock, and so refuse a restore. Its holders
//! are found in `/proc`, and named. A restore that is to ignore them holds the lock shared, and
//! another byte exclusively, which readers look at once they have the lock. It begins only if no
//! other process can hold the lock.

#[cfg(target_os = "linux")]
mod byte_lock;
#[cfg(target_os = "linux")]
mod holders;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
pub use linux::{check_not_restored, lock_to_restore};
#[cfg(not(target_os = "linux"))]
pub use others::{check_not_restored, lock_to_restore};

#[cfg(not(target_os = "linux"))]
mod others {
    use std::fs::{File, TryLockError};
    use std::path::Path;

    use anyhow::Context;

    use crate::failure::Failure;

    /// Checks nothing: readers request no lock, as it could not be distinguished from a lock of the
    /// VMM.
    pub fn check_not_restored(_: &File, _: &str) -> anyhow::Result<()> {
        Ok(())
    }

    /// Takes an `flock` until `file` is closed, or refuses the RAM at `path`.
    pub fn lock_to_restore(file: &File, path: &Path, _: &[u32]) -> anyhow::Result<()> {
        match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(Failure::TargetBusy {
                path: path.to_owned(),
                by: "lsof lists the processes that have the file open".to_owned(),
            }
            .into()),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {path:?}"))
            }
        }
    }
}
