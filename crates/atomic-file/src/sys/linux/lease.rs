//! Leases: whether other processes use a file.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::fs_type::magic_of;
use crate::retry::retry;

/// Returns whether the kernel counts all users of a file of this file system, open or mapped, so
/// that [`is_exclusively_open`] is reliable. This crate's tests run on each file system in the
/// list.
///
/// A stacked file system (overlayfs, FUSE) maps files of the lower one instead of its own. A
/// network file system does not count the users on other machines.
pub(crate) fn supports_leases(fd: impl AsFd) -> io::Result<bool> {
    const EXT: u32 = libc::EXT4_SUPER_MAGIC as u32;
    const XFS: u32 = libc::XFS_SUPER_MAGIC as u32;
    const BTRFS: u32 = libc::BTRFS_SUPER_MAGIC as u32;
    const TMPFS: u32 = libc::TMPFS_MAGIC as u32;
    Ok(matches!(magic_of(fd)?, EXT | XFS | BTRFS | TMPFS))
}

/// Returns whether no other open file or mapping refers to the file of `file`.
///
/// The kernel grants a write lease only in this case. The lease is released at once, because it
/// would delay every process that opens the file, including this one.
pub(crate) fn is_exclusively_open(file: &File) -> bool {
    lease(file, libc::c_int::from(libc::F_WRLCK)) && release_lease(file)
}

/// Acquires a read lease on `file`, which must be open for reading only. Until the lease is
/// [released](release_lease), an `open(2)` for writing by another process waits. Returns whether
/// the kernel granted it: no process has the file open for writing, and this one may hold leases on
/// it.
pub(crate) fn lease_for_reading(file: &File) -> bool {
    lease(file, libc::c_int::from(libc::F_RDLCK))
}

/// Returns whether the lease was released.
pub(crate) fn release_lease(file: &File) -> bool {
    set_lease(file, libc::F_SETLEASE, libc::c_int::from(libc::F_UNLCK))
}

fn lease(file: &File, kind: libc::c_int) -> bool {
    /// Linux's `include/uapi/asm-generic/fcntl.h`; libc has no constant for it.
    const F_SETSIG: libc::c_int = 10;
    // A process that opens the file in between makes the kernel send a signal, by default SIGIO,
    // which kills this process. SIGURG is ignored by default, and handlers of it expect spurious
    // signals.
    set_lease(file, F_SETSIG, libc::SIGURG) && set_lease(file, libc::F_SETLEASE, kind)
}

fn set_lease(file: &File, command: libc::c_int, argument: libc::c_int) -> bool {
    let fd = file.as_raw_fd();
    let set = retry(|| {
        // SAFETY: F_SETSIG and F_SETLEASE take an integer and no memory. `file` is borrowed, so it
        // is open.
        Errno::result(unsafe { libc::fcntl(fd, command, argument) })
    });
    set.is_ok()
}
