//! The few system calls that `std` and `nix` do not offer as this crate needs them.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd as _, OwnedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::stat::{Mode, fchmod};

use crate::directory::stat_of;
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

/// Gives the file exactly these permission bits. A new one was created with 0600, less what the umask took.
pub(crate) fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    const PERMISSIONS: u32 = 0o7777;
    if stat_of(file)?.mode & PERMISSIONS == mode {
        return Ok(());
    }
    let mode = Mode::from_bits_truncate(mode as libc::mode_t);
    retry(|| fchmod(file, mode))
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

/// Every name in a directory, in the file system's order.
///
/// nix's `Dir` loses the descriptor where `fdopendir` fails, which over NFS it can: it asks the server about the directory.
pub(crate) fn names(dir: OwnedFd) -> io::Result<Vec<CString>> {
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    use libc::readdir;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    use libc::readdir64 as readdir;

    struct Listing(NonNull<libc::DIR>);

    impl Drop for Listing {
        fn drop(&mut self) {
            // SAFETY: fdopendir(3) gave the stream, and nobody uses it any more.
            unsafe { libc::closedir(self.0.as_ptr()) };
        }
    }

    // SAFETY: fdopendir(3) takes a descriptor, which `dir` keeps open; only where it succeeds the stream owns it.
    let stream = unsafe { libc::fdopendir(dir.as_raw_fd()) };
    let listing = Listing(NonNull::new(stream).ok_or_else(io::Error::last_os_error)?);
    let _: libc::c_int = dir.into_raw_fd();
    let mut names = Vec::new();
    loop {
        Errno::clear();
        // SAFETY: the stream is open, and no other thread has it.
        let entry = unsafe { readdir(listing.0.as_ptr()) };
        if entry.is_null() {
            return match Errno::last_raw() {
                0 => Ok(names),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
        // SAFETY: readdir(3) gave an entry, whose name ends in NUL, and which stays as it is until the stream is read again. The
        // entry may be shorter than its type, so no reference is made to it.
        let name = unsafe { CStr::from_ptr((&raw const (*entry).d_name).cast()) };
        names.push(name.to_owned());
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
    renameat2(from_dir, from, to_dir, to, libc::RENAME_NOREPLACE)
}

/// Exchanges what two names in `dir` mean, at once. One attempt, as with [`rename_new`].
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn exchange(dir: impl AsFd, one: &CStr, other: &CStr) -> nix::Result<()> {
    renameat2(&dir, one, &dir, other, libc::RENAME_EXCHANGE)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn renameat2(
    from_dir: impl AsFd,
    from: &CStr,
    to_dir: impl AsFd,
    to: &CStr,
    flags: libc::c_uint,
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
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Without leases (see [`has_only_us`]) nothing is ever exchanged.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn exchange(_: impl AsFd, _: &CStr, _: &CStr) -> nix::Result<()> {
    Err(Errno::ENOTSUP)
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

/// Whether the kernel counts everybody who has a file of this file system open or mapped, so that
/// [`has_only_us`] can be believed. A list of those that the tests of this crate run on.
///
/// A stacked one (overlayfs, FUSE) maps files of the one below in place of its own, and a network one knows
/// nothing of other machines.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn counts_openers(fd: impl AsFd) -> io::Result<bool> {
    const EXT: u32 = libc::EXT4_SUPER_MAGIC as u32;
    const XFS: u32 = libc::XFS_SUPER_MAGIC as u32;
    const BTRFS: u32 = libc::BTRFS_SUPER_MAGIC as u32;
    const TMPFS: u32 = libc::TMPFS_MAGIC as u32;
    let fd = fd.as_fd();
    let statfs = retry(|| nix::sys::statfs::fstatfs(fd))?;
    // Magic numbers are 32 bits wide; the field's own width and sign differ between architectures.
    let magic = statfs.filesystem_type().0 as u32;
    Ok(matches!(magic, EXT | XFS | BTRFS | TMPFS))
}

/// There are no leases.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn counts_openers(_: impl AsFd) -> io::Result<bool> {
    Ok(false)
}

/// Whether nobody but `file` itself has that file open or mapped.
///
/// The kernel grants a write lease only then. It is given back at once: what matters is that it was granted, and one who
/// opens the file meanwhile, this process too, would have to wait for it.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn has_only_us(file: &File) -> io::Result<bool> {
    /// Linux's `include/uapi/asm-generic/fcntl.h`; libc has no constant for it.
    const F_SETSIG: libc::c_int = 10;
    let fd = file.as_raw_fd();
    // One who opens the file in the moment between makes the kernel send the holder a signal, by default SIGIO, which kills.
    // Nothing is done about SIGURG by default, and who handles it is used to its coming for nothing.
    let lease = |command, argument: libc::c_int| {
        retry(|| {
            // SAFETY: F_SETSIG and F_SETLEASE take an integer each, and no memory; `file` is borrowed, so open.
            Errno::result(unsafe { libc::fcntl(fd, command, argument) })
        })
    };
    lease(F_SETSIG, libc::SIGURG)?;
    match lease(libc::F_SETLEASE, libc::c_int::from(libc::F_WRLCK)) {
        Ok(_) => lease(libc::F_SETLEASE, libc::c_int::from(libc::F_UNLCK)).map(|_| true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// There are no leases: nobody can tell.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn has_only_us(_: &File) -> io::Result<bool> {
    Ok(false)
}

/// Whether `file` has extended attributes that a new file would not have, an access control list among them.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn has_attributes(file: &File) -> io::Result<bool> {
    let mut names = [0_u8; 1024];
    let listed = retry(|| {
        // SAFETY: flistxattr(2) writes at most `names.len()` bytes to `names`, which outlives the call; `file` is borrowed,
        // so open.
        Errno::result(unsafe {
            libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len())
        })
    });
    let length = match listed {
        Ok(length) => usize::try_from(length).unwrap_or(0),
        Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => 0,
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => return Ok(true),
        Err(error) => return Err(error),
    };
    // Security modules label every file, new ones too.
    Ok(names[..length]
        .split(|byte| *byte == 0)
        .any(|name| !name.is_empty() && !name.starts_with(b"security.")))
}

/// Nothing is recycled there.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn has_attributes(_: &File) -> io::Result<bool> {
    Ok(true)
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
