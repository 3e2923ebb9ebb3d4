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

use std::fs::File;

use anyhow::Context;

use crate::failure::Failure;

#[cfg(target_os = "linux")]
pub use linux::lock;
#[cfg(not(target_os = "linux"))]
pub use others::lock;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For reading the RAM.
    Shared,
    /// For restoring to the RAM.
    Exclusive,
}

/// The holder of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process, until the file is closed.
    Us,
    /// `ramsnap restore`.
    Restore,
    /// A ramsnap that reads the RAM.
    #[cfg_attr(
        not(target_os = "linux"),
        expect(dead_code, reason = "elsewhere, readers have no lock")
    )]
    Reader,
    /// A program that has locked all of the file; or the file system has no such locks.
    Unknown,
}

/// Refuses RAM that a `ramsnap restore` is writing to. No restore can begin while `file` is open.
pub fn check_not_restored(file: &File, ram: &str) -> anyhow::Result<()> {
    let locked = lock(file, Mode::Shared);
    match locked.with_context(|| format!("cannot lock {ram}"))? {
        Holder::Restore => Err(Failure::RamBeingRestored {
            ram: ram.to_owned(),
        }
        .into()),
        Holder::Us | Holder::Reader | Holder::Unknown => Ok(()),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io;

    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;

    use super::{Holder, Mode};

    /// `ramsnap` in ASCII. No RAM is as large.
    const AT: libc::off_t = 0x006d_656d_736e_6170;
    const LEN: libc::off_t = 1;

    /// Requests the lock without waiting.
    pub fn lock(file: &File, mode: Mode) -> io::Result<Holder> {
        let wanted = libc::flock {
            l_type: match mode {
                Mode::Shared => libc::F_RDLCK as libc::c_short,
                Mode::Exclusive => libc::F_WRLCK as libc::c_short,
            },
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: AT,
            l_len: LEN,
            l_pid: 0,
        };
        loop {
            match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
                Ok(_) => return Ok(Holder::Us),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                // NFS without its lock daemon, or a file system without locks.
                Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
                    return Ok(Holder::Unknown);
                }
                Err(errno) => return Err(errno.into()),
            }
            let mut found = wanted;
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
            let is = |kind: libc::c_int| libc::c_int::from(found.l_type) == kind;
            if is(libc::F_UNLCK) {
                // Released in the meantime.
                continue;
            }
            return Ok(match (found.l_start, found.l_len) {
                (AT, LEN) if is(libc::F_WRLCK) => Holder::Restore,
                (AT, LEN) => Holder::Reader,
                _ => Holder::Unknown,
            });
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod others {
    use std::fs::{File, TryLockError};
    use std::io;

    use super::{Holder, Mode};

    /// Requests an `flock` without waiting, to restore. Readers request none, as it could not be
    /// distinguished from a lock of the VMM.
    pub fn lock(file: &File, mode: Mode) -> io::Result<Holder> {
        match mode {
            Mode::Shared => Ok(Holder::Unknown),
            Mode::Exclusive => match file.try_lock() {
                Ok(()) => Ok(Holder::Us),
                Err(TryLockError::WouldBlock) => Ok(Holder::Restore),
                Err(TryLockError::Error(error)) => Err(error),
            },
        }
    }
}
