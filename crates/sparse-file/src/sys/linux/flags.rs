//! Inode flags: how ext4 stores a file.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// `FS_EXTENT_FL` of `include/uapi/linux/fs.h`: ext4 sets it for files that are mapped by extents.
const FS_EXTENT_FL: libc::c_int = 0x8_0000;
/// `FS_INLINE_DATA_FL`: the file is stored in its inode.
const FS_INLINE_DATA_FL: libc::c_int = 0x1000_0000;

/// Returns whether `file` is mapped by extents: on ext4, and on overlayfs if ext4 stores the file.
/// If the system does not report it, the file counts as one without extents.
///
/// ext4 looks up dirty pages for a hole between extents only. For a file that is mapped by indirect
/// blocks it reports a hole where pages were written and not written back yet.
pub(super) fn has_extents(file: &File) -> bool {
    // The kernel writes an `int`, although the request number is that of a `long`.
    let mut flags: libc::c_int = 0;
    loop {
        // SAFETY: FS_IOC_GETFLAGS writes an int, which `flags` is for the length of the call;
        // `file` is borrowed, so open.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
        match Errno::result(result) {
            Ok(_) => return flags & (FS_EXTENT_FL | FS_INLINE_DATA_FL) == FS_EXTENT_FL,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
