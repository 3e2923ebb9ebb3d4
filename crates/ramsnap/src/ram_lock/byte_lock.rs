//! Locks of single bytes of a file, by `fcntl`.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The byte that readers and restores lock: `memsnap` in ASCII, the former name of the tool. No RAM
/// is as large.
pub(super) const AT: libc::off_t = 0x006d_656d_736e_6170;

/// Returns a request for a lock of `range`.
pub(super) fn request(kind: libc::c_int, range: Range<libc::off_t>) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start,
        l_len: range.end - range.start,
        l_pid: 0,
    }
}

/// Returns whether the lock is of this kind, such as `F_RDLCK`.
pub(super) fn is(lock: &libc::flock, kind: libc::c_int) -> bool {
    libc::c_int::from(lock.l_type) == kind
}

/// Requests a lock. Returns whether it is taken, or `None` if the file has no such locks.
pub(super) fn set(file: &File, wanted: &libc::flock) -> nix::Result<Option<bool>> {
    loop {
        return match fcntl(file, FcntlArg::F_OFD_SETLK(wanted)) {
            Ok(_) => Ok(Some(true)),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(Some(false)),
            Err(errno) if is_without_locks(errno) => Ok(None),
            Err(errno) => Err(errno),
        };
    }
}

/// Returns whether the error is that of NFS without its lock daemon, or of a file system without
/// locks.
pub(super) fn is_without_locks(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL
    )
}

/// Returns a lock that `wanted` conflicts with.
pub(super) fn conflict(file: &File, wanted: &libc::flock) -> nix::Result<Option<libc::flock>> {
    let mut found = *wanted;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    Ok((!is(&found, libc::F_UNLCK)).then_some(found))
}
