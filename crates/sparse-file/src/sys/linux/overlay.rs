//! Which file system a file on overlayfs is stored on.
//!
//! overlayfs has a number of its own in `statfs(2)`, and since Linux 6.8 `/proc/self/maps` gives its
//! device also for mappings (`file_user_inode`). In a container the paths of the layers are not
//! visible. What remains are answers that overlayfs takes from the inode that stores the file.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{FS_IOC_FIEMAP, Fiemap, statx};

/// A file system whose reports of holes are used, under an overlayfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    Ext4,
    Xfs,
    Btrfs,
}

/// Returns the file system that stores `file`, which is on overlayfs, or `None` where the evidence is
/// not complete.
///
/// Each answer comes from the inode of the layer at the time of the call:
///
/// | answer | in overlayfs | what it excludes |
/// |---|---|---|
/// | `FS_IOC_FIEMAP` is supported | `ovl_fiemap` | FUSE, NFS, 9p, Ceph, ZFS, tmpfs: they have no `fiemap` |
/// | the same with `FIEMAP_FLAG_XATTR` | `ovl_fiemap` | all but ext4, XFS and f2fs |
/// | `FS_IOC_GETFLAGS` has `FS_EXTENT_FL` | `ovl_fileattr_get` | all but ext4, among those with `fiemap` |
/// | `statx(2)` knows `STATX_ATTR_NODUMP` and not `STATX_ATTR_ENCRYPTED` | `ovl_getattr` | ext4 and f2fs, so leaves XFS |
/// | `getxattr` knows the name space `btrfs.` and no unknown one | `ovl_xattr_get` | all but btrfs; ntfs3 and others know any |
///
/// A file on ext4 without extents (converted from ext3) gives no such evidence.
pub(crate) fn layer(file: &File) -> Option<Layer> {
    if !has_fiemap(file, 0) {
        return None;
    }
    if has_fiemap(file, FIEMAP_FLAG_XATTR) {
        return match (has_extent_flag(file), has_attributes_of_xfs(file)) {
            (true, false) => Some(Layer::Ext4),
            (false, true) => Some(Layer::Xfs),
            _ => None,
        };
    }
    let btrfs = knows_attribute(file, c"btrfs.compression")
        && !knows_attribute(file, c"sparse-file.unknown");
    btrfs.then_some(Layer::Btrfs)
}

const FIEMAP_FLAG_XATTR: u32 = 0x2;

/// Whether `FS_IOC_FIEMAP` with `flags` is supported. Lists no extent.
fn has_fiemap(file: &File, flags: u32) -> bool {
    let mut map = Fiemap {
        start: 0,
        length: 1,
        flags,
        extent_count: 0,
        ..Fiemap::default()
    };
    loop {
        // SAFETY: FS_IOC_FIEMAP reads and writes a fiemap with as many extents as `extent_count`
        // says, which `map` is for the length of the call; `file` is borrowed, so open.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
        match Errno::result(result) {
            Err(Errno::EINTR) => {}
            result => return result.is_ok(),
        }
    }
}

/// `FS_EXTENT_FL` of `include/uapi/linux/fs.h`: ext4 sets it for files that are mapped by extents.
const FS_EXTENT_FL: libc::c_long = 0x8_0000;

fn has_extent_flag(file: &File) -> bool {
    // The kernel writes an `int`, although the number of the call is that of a `long`.
    let mut flags: libc::c_int = 0;
    // SAFETY: FS_IOC_GETFLAGS writes an int, which `flags` is for the length of the call; `file` is
    // borrowed, so open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) };
    result == 0 && libc::c_long::from(flags) & FS_EXTENT_FL != 0
}

/// Whether `statx(2)` knows the attributes that XFS knows, and none of encryption, which ext4 and f2fs
/// know.
fn has_attributes_of_xfs(file: &File) -> bool {
    let Some(statx) = statx(file, libc::STATX_BASIC_STATS) else {
        return false;
    };
    let knows = |attribute: libc::c_int| statx.stx_attributes_mask & attribute as u64 != 0;
    // overlayfs itself knows no STATX_ATTR_NODUMP: where it is known, the mask is of the layer.
    knows(libc::STATX_ATTR_NODUMP) && !knows(libc::STATX_ATTR_ENCRYPTED)
}

/// Whether the file system has extended attributes of such a name, the file one or not.
fn knows_attribute(file: &File, name: &std::ffi::CStr) -> bool {
    // SAFETY: fgetxattr(2) reads the name, a C string, and writes nothing for a size of 0; `file` is
    // borrowed, so open.
    let result =
        unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) };
    matches!(Errno::result(result), Ok(_) | Err(Errno::ENODATA))
}
