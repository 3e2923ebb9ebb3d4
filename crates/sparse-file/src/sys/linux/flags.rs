//! Inode flags and attributes: how ext4 and XFS store a file.

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

/// `struct fsxattr` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Fsxattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

/// `_IOR('X', 31, struct fsxattr)`; the size in it is 28 bytes.
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801C_581F_u32 as libc::Ioctl;
const _: () = assert!(size_of::<Fsxattr>() == 28);
/// `FS_XFLAG_EXTSIZE`: the file has an extent size hint.
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// Returns the extent size hint of `file` in bytes: XFS allocates extents of this size, and what is
/// not written of them is reserved. Returns `None` if there is none, or if the file system has no
/// such hints.
pub(crate) fn extent_size_hint(file: &File) -> Option<u32> {
    let mut attributes = Fsxattr::default();
    // SAFETY: FS_IOC_FSGETXATTR writes an fsxattr, which `attributes` is for the length of the
    // call; `file` is borrowed, so open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    let is_set = result == 0 && attributes.xflags & FS_XFLAG_EXTSIZE != 0;
    (is_set && attributes.extsize > 0).then_some(attributes.extsize)
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
