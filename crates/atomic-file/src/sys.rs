//! The few system calls that `std` and `nix` do not offer as this crate needs them.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::options::Durability;

/// Makes `call` until a signal no longer interrupts it. Only for calls that are harmless when made twice.
pub(crate) fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// Brings what `fd` (a file or a directory) holds to where `durability` wants it.
///
/// Interrupted calls are made again: `EINTR` says that the call did not run to its end, not that a write failed.
/// Any other failure is final for this descriptor, as the kernel may have dropped the pages it could not write.
pub(crate) fn sync(fd: impl AsFd, durability: Durability) -> io::Result<()> {
    let fd = fd.as_fd();
    match durability {
        Durability::None => Ok(()),
        #[cfg(not(target_vendor = "apple"))]
        Durability::Barrier | Durability::Full => retry(|| nix::unistd::fsync(fd)),
        #[cfg(target_vendor = "apple")]
        Durability::Barrier | Durability::Full => {
            use nix::fcntl::{FcntlArg, fcntl};
            let full = || {
                let flushed = retry(|| fcntl(fd, FcntlArg::F_FULLFSYNC).map(drop));
                where_unsupported(flushed, || retry(|| nix::unistd::fsync(fd)))
            };
            if durability == Durability::Full {
                return full();
            }
            where_unsupported(
                retry(|| fcntl(fd, FcntlArg::F_BARRIERFSYNC).map(drop)),
                full,
            )
        }
    }
}

/// Takes the `weaker` way where `first` failed because the file system has no such call, and only there.
///
/// `F_FULLFSYNC` and `F_BARRIERFSYNC` fail with `ENOTTY` on exFAT, `ENOTSUP` on SMB, `EINVAL` or `ENOTTY` on FUSE.
/// `EIO` or `ENOSPC` mean that data was lost, and a second, weaker call might report success over the loss.
#[cfg(any(target_vendor = "apple", test))]
fn where_unsupported(
    first: io::Result<()>,
    weaker: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match first {
        Err(error)
            if matches!(
                Errno::from_raw(error.raw_os_error().unwrap_or(0)),
                Errno::ENOTTY | Errno::ENOTSUP | Errno::EINVAL
            ) =>
        {
            weaker()
        }
        result => result,
    }
}

/// Renames without replacing: `EEXIST` where `to` exists.
///
/// One attempt, not repeated on `EINTR`: whether an interrupted rename happened is for the caller to find out.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn rename_new(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
) -> nix::Result<()> {
    // By number: not every libc that Rust supports on Linux wraps it.
    // SAFETY: renameat2(2) reads the two paths, which `CStr` guarantees to be NUL-terminated and alive here,
    // and takes two descriptors, which `AsFd` guarantees to be open for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from_dir.as_fd().as_raw_fd(),
            from.as_ptr(),
            to_dir.as_fd().as_raw_fd(),
            to.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    Errno::result(result).map(drop)
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
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
pub(crate) fn rename_new(_: impl AsFd, _: &CStr, _: impl AsFd, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
}

/// What asking for a lock without waiting said.
#[derive(Debug)]
pub(crate) enum Lock {
    /// Ours, until the last descriptor of this open file is closed.
    Held,
    /// Somebody else's: they live.
    Taken,
    /// The file system has no such locks.
    Unsupported(io::Error),
}

/// Asks for the exclusive `flock` of `file` without waiting.
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

/// Waits for the exclusive `flock` of `file`.
pub(crate) fn lock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Whether the file system under `fd` gives files the same inode number after it is mounted again.
///
/// FAT and exFAT store none and make them up as they go, and so may whatever serves a FUSE mount.
pub(crate) fn has_lasting_inode_numbers(fd: impl AsFd) -> io::Result<bool> {
    let fd = fd.as_fd();
    let statfs = retry(|| nix::sys::statfs::fstatfs(fd))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        /// `EXFAT_SUPER_MAGIC` of Linux's `include/uapi/linux/magic.h`; libc has no constant for it.
        const EXFAT: u32 = 0x2011_BAB0;
        const MSDOS: u32 = libc::MSDOS_SUPER_MAGIC as u32;
        const FUSE: u32 = libc::FUSE_SUPER_MAGIC as u32;
        // Magic numbers are 32 bits wide; the field's own width and sign differ between architectures.
        let magic = statfs.filesystem_type().0 as u32;
        Ok(!matches!(magic, EXFAT | MSDOS | FUSE))
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let name = statfs.filesystem_type_name();
        Ok(!matches!(name, "exfat" | "msdos" | "msdosfs") && !name.contains("fuse"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::not_a_terminal(Errno::ENOTTY, true)]
    #[case::not_supported(Errno::ENOTSUP, true)]
    #[case::invalid(Errno::EINVAL, true)]
    #[case::lost_data(Errno::EIO, false)]
    #[case::no_space(Errno::ENOSPC, false)]
    #[case::quota(Errno::EDQUOT, false)]
    #[case::stale(Errno::ESTALE, false)]
    #[case::not_permitted(Errno::EPERM, false)]
    fn a_sync_falls_back_on_exactly_the_three_errors_that_mean_unsupported(
        #[case] errno: Errno,
        #[case] falls_back: bool,
    ) {
        let result = where_unsupported(Err(errno.into()), || Ok(()));
        assert_eq!(result.is_ok(), falls_back);
        if let Err(error) = result {
            assert_eq!(
                error.raw_os_error(),
                Some(errno as i32),
                "the first error is kept"
            );
        }
    }

    #[test]
    fn an_interrupted_call_is_made_again_and_any_other_failure_is_not() {
        let mut left = vec![Errno::EIO, Errno::EINTR, Errno::EINTR];
        let error =
            retry::<()>(|| Err(left.pop().expect("a call after a final failure"))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));
        assert!(left.is_empty());
    }
}
