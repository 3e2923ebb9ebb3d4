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
            Ok(_) => return are_of_extents(flags),
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

/// Returns whether a file with these flags is mapped by extents. A file in its inode is not, though
/// it may be later.
fn are_of_extents(flags: libc::c_int) -> bool {
    flags & (FS_EXTENT_FL | FS_INLINE_DATA_FL) == FS_EXTENT_FL
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::none(0, false)]
    #[case::extents(FS_EXTENT_FL, true)]
    #[case::with_others(FS_EXTENT_FL | 0x80, true)]
    #[case::others(0x80, false)]
    #[case::in_its_inode(FS_INLINE_DATA_FL, false)]
    #[case::both(FS_EXTENT_FL | FS_INLINE_DATA_FL, false)]
    fn only_extents_outside_of_the_inode_count(#[case] flags: libc::c_int, #[case] is: bool) {
        assert_eq!(are_of_extents(flags), is);
    }

    #[test]
    fn a_file_without_flags_counts_as_one_without_extents() {
        assert!(!has_extents(&File::open("/dev/null").expect("opened")));
    }
}
