//! Linux and Android.

#![allow(unsafe_code)]

mod acl;
mod fs_type;
mod lease;

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::PROC_SUPER_MAGIC;
use nix::unistd::{Uid, geteuid, setfsuid};

use super::restrictions::Restrictions;
use crate::durability::Durability;
use crate::ids::UserId;
use crate::retry::retry;
use crate::stat::{FROM_HANDLE, FileId, Stat};

use fs_type::magic_of;

pub(crate) use acl::{acl_of, copy_acl, is_acl, remove_acl};
pub(crate) use lease::{is_exclusively_open, lease_for_reading, release_lease, supports_leases};

/// Syncs `fd` to the medium. Linux has no weaker call that orders writes.
pub(super) fn flush(fd: BorrowedFd<'_>, _: Durability) -> io::Result<()> {
    retry(|| nix::unistd::fsync(fd))
}

/// Renames without replacing; fails with `EEXIST` if `to` exists.
///
/// Makes one attempt, which is not repeated on `EINTR`. The caller determines whether an
/// interrupted rename took effect.
pub(crate) fn rename_new(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
) -> nix::Result<()> {
    renameat2(from_dir, from, to_dir, to, libc::RENAME_NOREPLACE)
}

/// Exchanges two names in `dir` atomically. Makes one attempt, like [`rename_new`].
pub(crate) fn exchange(dir: impl AsFd, one: &CStr, other: &CStr) -> nix::Result<()> {
    renameat2(&dir, one, &dir, other, libc::RENAME_EXCHANGE)
}

fn renameat2(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
    flags: libc::c_uint,
) -> nix::Result<()> {
    // Called by number, because not every libc that Rust supports on Linux wraps it.
    // SAFETY: renameat2(2) reads the two paths, which `CStr` guarantees to be NUL-terminated and
    // alive here. It takes two descriptors, which `AsFd` guarantees to be open during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from_dir.as_fd().as_raw_fd(),
            from.as_ptr(),
            to_dir.as_fd().as_raw_fd(),
            to.as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Returns the attributes that forbid replacing `name` in `dir`. The empty name is `dir` itself.
/// Unknown attributes count as not set.
pub(crate) fn restrictions(dir: impl AsFd, name: &CStr) -> Restrictions {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH | libc::AT_NO_AUTOMOUNT;
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    let dir = dir.as_fd().as_raw_fd();
    // SAFETY: statx(2) reads the path, which `CStr` guarantees to be NUL-terminated, and writes at
    // most one `struct statx` to a buffer of that type.
    let result = unsafe { libc::statx(dir, name.as_ptr(), flags, 0, buffer.as_mut_ptr()) };
    if result != 0 {
        return Restrictions::default();
    }
    // SAFETY: all bytes of the buffer were zeroed or written by the kernel, and every field is an
    // integer.
    let found = unsafe { buffer.assume_init() }.stx_attributes;
    let has = |attribute: libc::c_int| found & attribute as u64 != 0;
    Restrictions {
        immutable: has(libc::STATX_ATTR_IMMUTABLE),
        append_only: has(libc::STATX_ATTR_APPEND),
        mount_point: has(libc::STATX_ATTR_MOUNT_ROOT),
    }
}

/// Returns whether the link `name` in `dir` leads to an open file rather than to the path in its
/// text. Only procfs has such links to files.
pub(crate) fn is_magic_link(dir: impl AsFd, name: &OsStr) -> io::Result<bool> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = dir.as_fd();
    let link = retry(|| openat(dir, name, flags, Mode::empty()))?;
    Ok(magic_of(&link)? == PROC_SUPER_MAGIC.0 as u32 && !leads_to_a_path(dir, name))
}

/// Returns whether the kernel follows the link by its text (`/proc/mounts`). Returns `false` if it
/// does not say so, as Linux before 5.6 and some seccomp filters.
#[cfg(target_os = "linux")]
fn leads_to_a_path(dir: BorrowedFd<'_>, name: &OsStr) -> bool {
    use nix::fcntl::{OpenHow, ResolveFlag, openat2};
    let how = OpenHow::new()
        .flags(OFlag::O_PATH.union(OFlag::O_CLOEXEC))
        .resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS);
    retry(|| openat2(dir, name, how)).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn leads_to_a_path(_: BorrowedFd<'_>, _: &OsStr) -> bool {
    false
}

/// Returns the user that owns files created by this thread: the effective user, unless
/// `setfsuid(2)` changed it.
pub(crate) fn file_owner() -> UserId {
    // No user has this ID, so nothing changes. The call returns the current ID.
    UserId::new(setfsuid(Uid::from_raw(u32::MAX)).as_raw())
}

/// Returns whether this thread may rename the file `entry` in the sticky directory `dir`: it is the
/// owner of one of them, or has the capability `CAP_FOWNER` over the file. A user namespace gives
/// no capability over a file whose owner or group it does not map.
pub(crate) fn may_rename_in_sticky(entry: &Stat, dir: &Stat) -> bool {
    const CAP_FOWNER: u64 = 1 << 3;
    let owners = [entry.uid, dir.uid];
    let is_mapped = entry.uid.is_mapped() && entry.gid.is_mapped();
    let Ok(status) = std::fs::read_to_string("/proc/thread-self/status") else {
        let me = UserId::new(geteuid().as_raw());
        return me.is_any_of(&owners) || (geteuid().is_root() && is_mapped);
    };
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    // The fields are the real, effective, saved and file system user.
    let uid = || field("Uid:")?.split_whitespace().nth(3)?.parse().ok();
    let capabilities = || u64::from_str_radix(field("CapEff:")?.trim(), 16).ok();
    uid().is_none_or(|uid| UserId::new(uid).is_any_of(&owners))
        || (is_mapped && capabilities().is_none_or(|found| found & CAP_FOWNER != 0))
}

/// Returns the generation of the file at `name`: see
/// [`Directory::generation`](crate::directory::Directory::generation).
pub(crate) fn generation(dir: impl AsFd, name: &OsStr) -> io::Result<u64> {
    // `O_PATH` requires no permission on the file and does not open it.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = dir.as_fd();
    let file = File::from(retry(|| openat(dir, name, flags, Mode::empty()))?);
    let since = |created: SystemTime| created.duration_since(SystemTime::UNIX_EPOCH).ok();
    let since = file.metadata()?.created().ok().and_then(since);
    match since.map_or(0, |since| since.as_nanos() as u64) {
        0 => generation_of_handle(&file),
        since => Ok(since),
    }
}

/// Returns a digest of the file's handle, which is unique in the file system for all time; 0 if
/// there is no handle.
fn generation_of_handle(file: &File) -> io::Result<u64> {
    /// `MAX_HANDLE_SZ` of Linux's `include/linux/exportfs.h`.
    const MAX_HANDLE_LEN: usize = 128;
    /// `struct file_handle` of Linux's `include/linux/fs.h`.
    #[repr(C)]
    struct Handle {
        length: libc::c_uint,
        kind: libc::c_int,
        bytes: [u8; MAX_HANDLE_LEN],
    }
    let mut handle = Handle {
        length: MAX_HANDLE_LEN as libc::c_uint,
        kind: 0,
        bytes: [0; MAX_HANDLE_LEN],
    };
    let mut mount: libc::c_int = 0;
    let answered = retry(|| {
        // Called by number, because not every libc that Rust supports on Linux wraps it.
        // SAFETY: name_to_handle_at(2) reads the path, which is NUL-terminated, and takes a
        // descriptor that the borrowed file keeps open. It writes to `mount` and to `handle`, and
        // at most `length` bytes to its `bytes`.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                file.as_raw_fd(),
                c"".as_ptr(),
                &raw mut handle,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        })
    });
    match answered {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
        // The file system has no handles, or a sandbox forbids the call.
        Err(_) => return Ok(0),
    }
    let length = (handle.length as usize).min(MAX_HANDLE_LEN);
    let bytes = handle.kind.to_le_bytes().into_iter();
    Ok(digest_of(
        bytes.chain(handle.bytes[..length].iter().copied()),
    ))
}

/// Returns a digest that is marked as one of a handle: FNV-1a.
fn digest_of(bytes: impl Iterator<Item = u8>) -> u64 {
    let digest = bytes.fold(0xcbf2_9ce4_8422_2325, |digest: u64, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    digest | FROM_HANDLE
}

/// Returns whether the file with this device and inode number is known to be in use as swap space.
pub(crate) fn is_swap(id: FileId) -> bool {
    let Ok(table) = std::fs::read("/proc/swaps") else {
        return false;
    };
    let mut lines = table.split(|byte| *byte == b'\n').skip(1);
    lines.any(|line| {
        let path = line.split(|byte| *byte == b' ').next().unwrap_or_default();
        let found = nix::sys::stat::stat(Path::new(&OsString::from_vec(unescaped(path))));
        found.is_ok_and(|found| (found.st_dev, found.st_ino) == (id.device, id.inode))
    })
}

/// Decodes the kernel's escapes: a backslash and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

/// Returns whether the file system of `fd` keeps inode numbers across mounts.
///
/// FAT and exFAT store none and assign them on demand, and so may a FUSE server.
pub(crate) fn has_lasting_inode_numbers(fd: impl AsFd) -> io::Result<bool> {
    /// `EXFAT_SUPER_MAGIC` of Linux's `include/uapi/linux/magic.h`; libc has no constant for it.
    const EXFAT: u32 = 0x2011_BAB0;
    const MSDOS: u32 = libc::MSDOS_SUPER_MAGIC as u32;
    const FUSE: u32 = libc::FUSE_SUPER_MAGIC as u32;
    Ok(!matches!(magic_of(fd)?, EXFAT | MSDOS | FUSE))
}

/// Returns whether `file` has extended attributes that a new file would lack, including an access
/// control list. Fails with `ERANGE` if their list is too long.
pub(crate) fn has_attributes(file: &File) -> io::Result<bool> {
    let mut names = [0_u8; 1024];
    let listed = retry(|| {
        // SAFETY: flistxattr(2) writes at most `names.len()` bytes to `names`, which outlives the
        // call. `file` is borrowed, so it is open.
        Errno::result(unsafe {
            libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len())
        })
    });
    let length = match listed {
        Ok(length) => usize::try_from(length).unwrap_or(0),
        Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => 0,
        Err(error) => return Err(error),
    };
    // Security modules also label new files.
    Ok(names[..length]
        .split(|byte| *byte == 0)
        .any(|name| !name.is_empty() && !name.starts_with(b"security.")))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn digests_differ_and_are_marked_as_those_of_handles() {
        let inputs = (0..=u8::MAX).map(|byte| [byte, 7]);
        let digests: BTreeSet<_> = inputs.map(|bytes| digest_of(bytes.into_iter())).collect();
        assert_eq!(digests.len(), 256);
        assert!(digests.iter().all(|digest| digest & FROM_HANDLE != 0));
    }
}
