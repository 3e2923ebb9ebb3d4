//! As all others have it, Apple's systems first of all.

#![allow(unsafe_code)]

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{fstat, fstatat};
use nix::unistd::geteuid;

use super::{Restrictions, retry};
use crate::directory::FileId;
use crate::options::Durability;

/// Waits until what `fd` holds is on the medium, or cannot be overtaken by later writes.
#[cfg(target_vendor = "apple")]
pub(super) fn flush(fd: BorrowedFd<'_>, durability: Durability) -> io::Result<()> {
    use super::fall_back_if_unsupported;
    use nix::fcntl::{FcntlArg, fcntl};
    let full = || {
        let flushed = retry(|| fcntl(fd, FcntlArg::F_FULLFSYNC).map(drop));
        fall_back_if_unsupported(flushed, || retry(|| nix::unistd::fsync(fd)))
    };
    if durability == Durability::Full {
        return full();
    }
    fall_back_if_unsupported(
        retry(|| fcntl(fd, FcntlArg::F_BARRIERFSYNC).map(drop)),
        full,
    )
}

/// Waits until what `fd` holds is on the medium.
#[cfg(not(target_vendor = "apple"))]
pub(super) fn flush(fd: BorrowedFd<'_>, _: Durability) -> io::Result<()> {
    retry(|| nix::unistd::fsync(fd))
}

/// Renames without replacing: `EEXIST` where `to` exists.
///
/// One attempt, not repeated on `EINTR`: whether an interrupted rename happened is for the caller to find out.
#[cfg(target_vendor = "apple")]
pub(crate) fn rename_new(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: renameatx_np(2) reads the two paths, which `CStr` guarantees to be NUL-terminated and alive here,
    // and takes two descriptors, which `AsFd` guarantees to be open for the length of the call.
    let result = unsafe {
        libc::renameatx_np(
            from_dir.as_fd().as_raw_fd(),
            from.as_ptr(),
            to_dir.as_fd().as_raw_fd(),
            to.as_ptr(),
            libc::RENAME_EXCL,
        )
    };
    Errno::result(result).map(drop)
}

/// Renames without replacing: nowhere else is there such a call, and `link` does it.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn rename_new(_: impl AsFd, _: &CStr, _: impl AsFd, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// Without leases (see [`has_only_us`]) nothing is ever exchanged.
pub(crate) fn exchange(_: impl AsFd, _: &CStr, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// Access control lists are not kept in extended attributes.
pub(crate) fn is_acl(_: &OsStr) -> bool {
    false
}

/// Gives `to` the access control list of `from`, or none if that has none.
#[cfg(target_vendor = "apple")]
pub(crate) fn copy_acl(from: &File, to: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: fcopyfile(3) takes two descriptors, which the borrowed files keep open, and no state.
    let result = unsafe { libc::fcopyfile(from, to, std::ptr::null_mut(), libc::COPYFILE_ACL) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Gives `to` the access control list of `from`: not known how.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn copy_acl(_: &File, _: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Takes an access control list away: not known how. One that is inherited stays.
pub(crate) fn remove_acl(_: &File) -> io::Result<()> {
    Ok(())
}

/// Whether `dir` has an access control list: what it gives is not in the mode.
pub(crate) fn has_acl(_: impl AsFd) -> bool {
    false
}

/// Swap space is the system's own, in a directory that nobody saves to.
pub(crate) fn is_swap(_: FileId) -> bool {
    false
}

/// What the system says against replacing `name` in `dir`; the empty name is `dir` itself. Nothing where
/// it does not say.
pub(crate) fn restrictions(dir: impl AsFd, name: &CStr) -> Restrictions {
    let dir = dir.as_fd();
    let stat = if name.is_empty() {
        fstat(dir)
    } else {
        fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
    };
    let Ok(stat) = stat else {
        return Restrictions::default();
    };
    #[cfg(target_vendor = "apple")]
    let restrictions = Restrictions {
        immutable: stat.st_flags & (libc::UF_IMMUTABLE | libc::SF_IMMUTABLE) != 0,
        append_only: stat.st_flags & (libc::UF_APPEND | libc::SF_APPEND) != 0,
        mount_point: false,
    };
    #[cfg(not(target_vendor = "apple"))]
    let restrictions = {
        let _: libc::stat = stat;
        Restrictions::default()
    };
    restrictions
}

/// The user that files created by this process belong to.
pub(crate) fn file_owner() -> u32 {
    geteuid().as_raw()
}

/// Whether this process may rename files of the users `owners` that a sticky directory protects.
pub(crate) fn may_act_for(owners: [u32; 2]) -> bool {
    geteuid().is_root() || owners.contains(&geteuid().as_raw())
}

/// When the file at `name` was created: see
/// [`Directory::generation`](crate::directory::Directory::generation).
pub(crate) fn generation(dir: impl AsFd, name: &OsStr) -> io::Result<u64> {
    let dir = dir.as_fd();
    let stat = retry(|| fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW))?;
    #[cfg(target_vendor = "apple")]
    let created = stat.st_birthtime as u64 * 1_000_000_000 + stat.st_birthtime_nsec as u64;
    #[cfg(not(target_vendor = "apple"))]
    let created = {
        let _: libc::stat = stat;
        0
    };
    Ok(created)
}

/// Whether the file system under `fd` gives files the same inode number after it is mounted again.
///
/// FAT and exFAT store none and make them up as they go, and so may whatever serves a FUSE mount.
pub(crate) fn has_lasting_inode_numbers(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    let statfs = retry(|| nix::sys::statfs::fstatfs(fd))?;
    let name = statfs.filesystem_type_name();
    Ok(!matches!(name, "exfat" | "msdos" | "msdosfs") && !name.contains("fuse"))
}

/// There are no leases.
pub(crate) fn supports_leases(_: impl AsFd) -> io::Result<bool> {
    Ok(false)
}

/// There are no leases: nobody can tell.
pub(crate) fn is_exclusively_open(_: &File) -> bool {
    false
}

/// Nothing is recycled there.
pub(crate) fn has_attributes(_: &File) -> io::Result<bool> {
    Ok(true)
}
