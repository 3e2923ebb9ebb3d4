//! Determines the file system that stores a file on overlayfs.
//!
//! overlayfs has its own number in `statfs(2)`, and since Linux 6.8 `/proc/self/maps` shows its
//! device also for mappings (`file_user_inode`). The paths of the layers are not visible in a
//! container. The remaining evidence are results that overlayfs takes from the inode that stores
//! the file.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::fiemap::{FIEMAP_FLAG_XATTR, has_fiemap};
use super::flags::has_extents;
use super::statx;

/// A file system below an overlayfs whose reports of holes are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    Ext4,
    Xfs,
    Btrfs,
}

/// Returns the file system that stores `file`, which is on overlayfs. Returns `None` if the
/// evidence is incomplete.
///
/// Each result comes from the inode of the layer at the time of the call:
///
/// - `FS_IOC_FIEMAP` is supported (`ovl_fiemap`): excludes FUSE, NFS, 9p, Ceph, ZFS and tmpfs,
///   which have no `fiemap`.
/// - The same with `FIEMAP_FLAG_XATTR` (`ovl_fiemap`): excludes all but ext4, XFS and f2fs.
/// - `FS_IOC_GETFLAGS` returns `FS_EXTENT_FL` (`ovl_fileattr_get`): excludes all but ext4, among
///   those with `fiemap`.
/// - `statx(2)` supports `STATX_ATTR_NODUMP` and not `STATX_ATTR_ENCRYPTED` (`ovl_getattr`):
///   excludes ext4 and f2fs, which leaves XFS.
/// - `getxattr` supports the name space `btrfs.` and no unknown one (`ovl_xattr_get`): excludes all
///   but btrfs; ntfs3 and others accept any.
///
/// A file on ext4 without extents provides no such evidence, and its reports are not used on ext4
/// itself either.
pub(crate) fn layer(file: &File) -> Option<Layer> {
    if !has_fiemap(file, 0) {
        return None;
    }
    if has_fiemap(file, FIEMAP_FLAG_XATTR) {
        return match (has_extents(file), has_attributes_of_xfs(file)) {
            (true, false) => Some(Layer::Ext4),
            (false, true) => Some(Layer::Xfs),
            _ => None,
        };
    }
    let btrfs = knows_attribute(file, c"btrfs.compression")
        && !knows_attribute(file, c"sparse-file.unknown");
    btrfs.then_some(Layer::Btrfs)
}

/// Returns whether `statx(2)` supports the attributes of XFS, and none of encryption, which ext4
/// and f2fs support.
fn has_attributes_of_xfs(file: &File) -> bool {
    let Some(statx) = statx(file, libc::STATX_BASIC_STATS) else {
        return false;
    };
    let knows = |attribute: libc::c_int| statx.stx_attributes_mask & attribute as u64 != 0;
    // overlayfs itself does not support STATX_ATTR_NODUMP: if it is supported, the mask is that of
    // the layer.
    knows(libc::STATX_ATTR_NODUMP) && !knows(libc::STATX_ATTR_ENCRYPTED)
}

/// Returns whether the file system supports extended attributes of this name, even if the file has
/// none.
fn knows_attribute(file: &File, name: &std::ffi::CStr) -> bool {
    // SAFETY: fgetxattr(2) reads the name, a C string, and writes nothing for a size of 0; `file`
    // is borrowed, so open.
    let result =
        unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), std::ptr::null_mut(), 0) };
    matches!(Errno::result(result), Ok(_) | Err(Errno::ENODATA))
}
