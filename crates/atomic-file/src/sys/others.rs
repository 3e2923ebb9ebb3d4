//! Apple's systems, and all others except Linux.

#![allow(unsafe_code)]

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{fstat, fstatat};
use nix::unistd::geteuid;

use super::restrictions::Restrictions;
use crate::acl::Acl;
use crate::durability::Durability;
use crate::ids::UserId;
use crate::retry::retry;
use crate::stat::{FileId, Stat};

/// Syncs `fd` to the medium, or orders its writes before later ones.
#[cfg(target_vendor = "apple")]
pub(super) fn flush(fd: BorrowedFd<'_>, durability: Durability) -> io::Result<()> {
    use super::unsupported::fall_back_if_unsupported;
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

/// Syncs `fd` to the medium.
#[cfg(not(target_vendor = "apple"))]
pub(super) fn flush(fd: BorrowedFd<'_>, _: Durability) -> io::Result<()> {
    retry(|| nix::unistd::fsync(fd))
}

/// Renames without replacing; fails with `EEXIST` if `to` exists.
///
/// Makes one attempt, which is not repeated on `EINTR`. The caller determines whether an
/// interrupted rename took effect.
#[cfg(target_vendor = "apple")]
pub(crate) fn rename_new(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: renameatx_np(2) reads the two paths, which `CStr` guarantees to be NUL-terminated and
    // alive here. It takes two descriptors, which `AsFd` guarantees to be open during the call.
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

/// Fails: these systems have no such call. The caller uses `link`.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn rename_new(_: impl AsFd, _: &CStr, _: impl AsFd, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// Fails. It is never called without leases, see [`is_exclusively_open`].
pub(crate) fn exchange(_: impl AsFd, _: &CStr, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// Returns `false`: access control lists are not extended attributes here.
pub(crate) fn is_acl(_: &OsStr) -> bool {
    false
}

/// Returns whether `file` has an access control list. It is not read: its entries may deny what the
/// mode grants.
#[cfg(target_vendor = "apple")]
pub(crate) fn acl_of(file: &File) -> io::Result<Acl> {
    use std::ffi::{c_int, c_void};
    use std::os::fd::AsRawFd;
    /// `ACL_TYPE_EXTENDED` of the system's `sys/acl.h`.
    const EXTENDED: c_int = 0x100;
    unsafe extern "C" {
        fn acl_get_fd_np(fd: c_int, kind: c_int) -> *mut c_void;
        fn acl_free(list: *mut c_void) -> c_int;
    }
    loop {
        // SAFETY: acl_get_fd_np(3) takes a descriptor, which the borrowed file keeps open, and a
        // number. It returns null, or a list that it allocated.
        let list = unsafe { acl_get_fd_np(file.as_raw_fd(), EXTENDED) };
        if !list.is_null() {
            // SAFETY: acl_get_fd_np(3) returned the list, and it is not used after this.
            unsafe { acl_free(list) };
            return Ok(Acl::Unknown);
        }
        match Errno::last() {
            Errno::EINTR => {}
            // No list, or no lists on this file system.
            Errno::ENOENT | Errno::ENOTSUP => return Ok(Acl::Absent),
            errno => return Err(errno.into()),
        }
    }
}

/// Returns [`Acl::Unknown`]: not implemented for these systems.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn acl_of(_: &File) -> io::Result<Acl> {
    Ok(Acl::Unknown)
}

/// Copies the access control list of `from` to `to`. Removes it if `from` has none. The list does
/// not include the permission bits here.
#[cfg(target_vendor = "apple")]
pub(crate) fn copy_acl(from: &File, _: &Acl, to: &File, _: u32) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: fcopyfile(3) takes two descriptors, which the borrowed files keep open, and no state.
    let result = unsafe { libc::fcopyfile(from, to, std::ptr::null_mut(), libc::COPYFILE_ACL) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Fails: not implemented for these systems.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn copy_acl(_: &File, _: &Acl, _: &File, _: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Does nothing: an inherited list stays on these systems.
pub(crate) fn remove_acl(_: &File) -> io::Result<()> {
    Ok(())
}

/// Returns `false`: swap space is in a directory of the system.
pub(crate) fn is_swap(_: FileId) -> bool {
    false
}

/// Returns the attributes that forbid replacing `name` in `dir`. The empty name is `dir` itself.
/// Unknown attributes count as not set.
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

/// Returns `false`: on these systems, each link leads to the path in its text.
pub(crate) fn is_magic_link(_: impl AsFd, _: &OsStr) -> io::Result<bool> {
    Ok(false)
}

/// Returns the user that owns files created by this process.
pub(crate) fn file_owner() -> UserId {
    UserId::new(geteuid().as_raw())
}

/// Returns whether this process may rename the file `entry` in the sticky directory `dir`.
pub(crate) fn may_rename_in_sticky(entry: &Stat, dir: &Stat) -> bool {
    geteuid().is_root() || file_owner().is_any_of(&[entry.uid, dir.uid])
}

/// Returns the generation of the file at `name`, its time of creation: see
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

/// Returns whether the file system of `fd` keeps inode numbers across mounts.
///
/// FAT and exFAT store none and assign them on demand, and so may a FUSE server.
pub(crate) fn has_lasting_inode_numbers(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    let statfs = retry(|| nix::sys::statfs::fstatfs(fd))?;
    let name = statfs.filesystem_type_name();
    Ok(!matches!(name, "exfat" | "msdos" | "msdosfs") && !name.contains("fuse"))
}

/// Returns `false`: these systems have no leases.
pub(crate) fn supports_leases(_: impl AsFd) -> io::Result<bool> {
    Ok(false)
}

/// Returns `false`: these systems have no leases.
pub(crate) fn is_exclusively_open(_: &File) -> bool {
    false
}

/// Returns `false`: these systems have no leases.
pub(crate) fn lease_for_reading(_: &File) -> bool {
    false
}

/// Returns `false`: these systems have no leases.
pub(crate) fn release_lease(_: &File) -> bool {
    false
}

/// Returns `true`, so that no file is recycled.
pub(crate) fn has_attributes(_: &File) -> io::Result<bool> {
    Ok(true)
}
