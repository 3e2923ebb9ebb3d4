//! System calls that `std` and `nix` do not provide in the required form.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd as _, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};
use xattr::FileExt as _;

use crate::durability::Durability;
use crate::retry::retry;
use crate::stat::stat_of;

#[cfg(any(target_os = "linux", target_os = "android"))]
mod linux;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod others;
mod restrictions;
#[cfg(any(target_vendor = "apple", test))]
mod unsupported;

#[cfg(any(target_os = "linux", target_os = "android"))]
use linux as platform;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
use others as platform;

use platform::flush;
pub(crate) use platform::{
    acl_of, copy_acl, exchange, file_owner, generation, has_attributes, has_lasting_inode_numbers,
    is_acl, is_exclusively_open, is_magic_link, is_swap, lease_for_reading, may_rename_in_sticky,
    release_lease, remove_acl, rename_new, restrictions, supports_leases,
};
pub(crate) use restrictions::Restrictions;

/// Sets exactly these permission bits. A new file has 0600 without the bits of the umask.
///
/// Fails if the system silently drops set-id bits, as Linux does with the set-group-id bit if the
/// file's group is not one of the process's groups.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    const PERMISSIONS: u32 = 0o7777;
    const SET_ID: u32 = 0o6000;
    if stat_of(file)?.mode & PERMISSIONS == mode {
        return Ok(());
    }
    let bits = Mode::from_bits_truncate(mode as libc::mode_t);
    retry(|| fchmod(file, bits))?;
    if mode & SET_ID != 0 && stat_of(file)?.mode & SET_ID != mode & SET_ID {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "this process is not permitted to set the set-user-id or set-group-id bit",
        ));
    }
    Ok(())
}

/// Syncs `fd`, a file or a directory, as `durability` requires.
///
/// Interrupted calls are repeated: `EINTR` means that the call did not complete, not that a write
/// failed. Any other error is final for this descriptor, because the kernel may have dropped the
/// pages that it could not write.
pub(crate) fn sync(fd: impl AsFd, durability: Durability) -> io::Result<()> {
    let fd = fd.as_fd();
    match durability {
        Durability::None => Ok(()),
        Durability::Barrier | Durability::Full => flush(fd, durability),
    }
}

/// Returns the names in a directory that begin with `prefix`, in the file system's order.
///
/// nix's `Dir` leaks the descriptor if `fdopendir` fails, which can happen over NFS.
pub(crate) fn names(dir: OwnedFd, prefix: &str) -> io::Result<Vec<CString>> {
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    use libc::readdir;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    use libc::readdir64 as readdir;

    struct Listing(NonNull<libc::DIR>);

    impl Drop for Listing {
        fn drop(&mut self) {
            // SAFETY: fdopendir(3) returned the stream, and it is not used after this.
            unsafe { libc::closedir(self.0.as_ptr()) };
        }
    }

    let open = || {
        // SAFETY: fdopendir(3) takes a descriptor, which `dir` keeps open. The stream owns it only
        // on success.
        let stream = unsafe { libc::fdopendir(dir.as_raw_fd()) };
        NonNull::new(stream).ok_or_else(Errno::last)
    };
    let listing = Listing(retry(open)?);
    let _: libc::c_int = dir.into_raw_fd();
    let mut names = Vec::new();
    loop {
        Errno::clear();
        // SAFETY: the stream is open, and no other thread uses it.
        let entry = unsafe { readdir(listing.0.as_ptr()) };
        if entry.is_null() {
            return match Errno::last_raw() {
                0 => Ok(names),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
        // SAFETY: readdir(3) returned an entry. Its name is NUL-terminated, and it is unchanged
        // until the next read of the stream. The entry may be shorter than its type, so no
        // reference to it is made.
        let name = unsafe { CStr::from_ptr((&raw const (*entry).d_name).cast()) };
        if name.to_bytes().starts_with(prefix.as_bytes()) {
            names.push(name.to_owned());
        }
    }
}

/// The result of trying to lock a file.
#[derive(Debug)]
pub(crate) enum Lock {
    /// This open file holds the lock, until its last descriptor is closed.
    Held,
    /// Another open file holds the lock: it is in use.
    Taken,
    /// The file system has no such locks.
    Unsupported(io::Error),
}

/// Tries to acquire the exclusive `flock` of `file` without waiting.
pub(crate) fn try_lock(file: &File) -> io::Result<Lock> {
    loop {
        let error = match file.try_lock() {
            Ok(()) => return Ok(Lock::Held),
            Err(std::fs::TryLockError::WouldBlock) => return Ok(Lock::Taken),
            Err(std::fs::TryLockError::Error(error)) => error,
        };
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::EINTR => {}
            // ENOLCK: an NFS mount whose lock daemon does not answer.
            Errno::ENOTSUP | Errno::ENOSYS | Errno::ENOLCK | Errno::EINVAL => {
                return Ok(Lock::Unsupported(error));
            }
            _ => return Err(error),
        }
    }
}

/// A guard that releases the `flock` of a file on drop. A child that another thread has just forked
/// may still have the descriptor, and would hold the lock until it closes it.
#[derive(Debug)]
pub(crate) struct Unlock<'f>(pub(crate) &'f File);

impl Drop for Unlock<'_> {
    fn drop(&mut self) {
        // If this fails, closing releases it.
        let _ = self.0.unlock();
    }
}

/// Waits for the exclusive `flock` of `file`.
pub(crate) fn lock(file: &File) -> io::Result<()> {
    let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
    retry(|| file.lock().map_err(errno))
}

/// Copies an extended attribute of `from` to `to`. Removes it if `from` lacks it.
pub(crate) fn copy_xattr(from: &File, to: &File, name: &OsStr) -> io::Result<()> {
    let value = from.get_xattr(name)?;
    let there = to.get_xattr(name).ok().flatten();
    match value {
        // The security label of a new file is often the same, and setting it may be forbidden.
        Some(value) if there.as_ref() == Some(&value) => Ok(()),
        Some(value) => to.set_xattr(name, &value),
        None if there.is_some() => to.remove_xattr(name),
        None => Ok(()),
    }
}
