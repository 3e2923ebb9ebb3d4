//! Decides whether the holes that a file system reports for an open file are reliable.
//!
//! This decision is made only here. Each file system implements `SEEK_HOLE` and `SEEK_DATA` in its
//! own way. POSIX permits that written bytes are reported as a hole only if they are zeros. File
//! systems that violate this report no error:
//!
//! - FUSE forwards the call to its server without writing back pages that were dirtied through a
//!   mapping: RAM that a guest wrote may be in a reported hole. The same applies to `write(2)` with
//!   the writeback cache.
//! - OpenZFS before 2.2.2 and 2.1.14 could report a hole for data that was not written out.
//! - APFS returns ENXIO inside clones.
//! - ext4 reports holes over delayed blocks of files that are not mapped by extents.
//!
//! A report is therefore used only where the implementation is known: ext4 (files with extents),
//! XFS, btrfs and tmpfs of Linux, and overlayfs where the file is found to be stored on one of the
//! first three. Everywhere else the whole file counts as data. The only cost is that ranges are
//! read that could have been skipped.

use std::fs::File;
use std::io;

use crate::sys;

/// The reason why the holes that are reported for a file are not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HolesUnknown {
    /// The file is a directory, device, FIFO or socket.
    #[error("the file is not a regular file")]
    NotAFile,
    /// The implementation of the file system is not known to report holes correctly.
    #[error(
        "the file system ({file_system}) is not known to report holes correctly: use ext4, XFS, \
         btrfs or tmpfs on Linux"
    )]
    FileSystem {
        /// The name of the file system, or its number in hexadecimal.
        file_system: String,
    },
    /// The file is on ext4 (or ext2, ext3) and is not stored in extents, or the system does not
    /// report whether it is.
    #[error(
        "the file is not stored in extents, and ext4 may report written data of such a file as a \
         hole: use a file that was created on ext4 with the feature `extent`, XFS, btrfs or tmpfs"
    )]
    NoExtents,
    /// The type of the file or of its file system could not be determined.
    #[error("failed to determine the file system of the file: {0}")]
    Io(#[from] io::Error),
}

/// Returns `Ok` if every range that is reported as a hole of `file` is known to read as zeros. This
/// includes a file that is being written through mappings and was not written back yet.
///
/// [`extents`](crate::extents()) lists holes according to this check. The check makes one
/// `fstat(2)` and one `fstatfs(2)`, on ext4 one call more, on overlayfs at most four, and neither
/// reads nor writes data. It is valid for the open file only: repeat it for another file.
///
/// | file system | implementation |
/// |---|---|
/// | ext4, files with extents | `ext4_llseek`, `iomap_seek_data` |
/// | XFS | `xfs_file_llseek`, `iomap_seek_data` |
/// | btrfs | `find_desired_extent` |
/// | tmpfs, memfd, shared anonymous memory | `shmem_file_llseek`, `mapping_seek_hole_data` |
///
/// Dirty pages are reported as data:
///
/// - ext4 reports delayed blocks as data and looks up unwritten extents in the page cache.
/// - XFS does the same, and includes the copy-on-write fork of a reflinked file.
/// - btrfs reports delayed allocation and ordered extents as data.
/// - In tmpfs, memfd and shared anonymous memory the page cache is the file. Swapped-out pages are
///   data.
///
/// On each of them, the first write to a page of a mapping allocates or reserves the block
/// (`page_mkwrite`), so that a page that is dirty in memory only is data as well.
///
/// ext4 does this for files that are mapped by extents (`ext4_ext_map_blocks`). For those mapped by
/// indirect blocks it reports a hole from an unmapped block to the end of the indirect block, and
/// delayed blocks may be in it (`ext4_ind_map_blocks`). The mapping is a property of each file,
/// which `FS_IOC_GETFLAGS` returns. The reports of a file without extents are not used:
///
/// - Each file of an ext2 or ext3, which have the number of ext4, whichever driver mounted it, and
///   of an ext4 made without the feature `extent`.
/// - A file that was created before ext4 had the feature, or that lost its extents by `chattr -e`.
/// - A file that is stored in its inode (feature `inline_data`). It gets extents once it grows.
/// - Any file on ext4 if the call fails.
///
/// overlayfs, on which containers run, forwards the call to the file system that stores the file
/// (`ovl_llseek`). Reads, writes and maps of a file that is open for writing use the same inode
/// (`ovl_read_iter`, `ovl_write_iter`, `ovl_mmap`). A file on overlayfs is therefore treated as one
/// on ext4, XFS or btrfs if it is known to be stored there:
///
/// - The file system below must support `FS_IOC_FIEMAP` (`ovl_fiemap`). FUSE, network file systems
///   other than SMB, OpenZFS and tmpfs do not.
/// - With `FIEMAP_FLAG_XATTR` only ext4, XFS and f2fs support it. ext4 is recognized by
///   `FS_EXTENT_FL` (`ovl_fileattr_get`), XFS by the attributes that `statx(2)` supports
///   (`ovl_getattr`).
/// - Of the others, btrfs is recognized by its name space of extended attributes (`ovl_xattr_get`).
///
/// The results come from the inode that stores the file at that moment. The first open for writing
/// moves a file from a lower layer to the upper one (`ovl_copy_up`), possibly to another file
/// system, and `chattr -e` removes the extents of an open file. [`extents`](crate::extents())
/// therefore checks again after each hole that overlayfs or ext4 reported.
///
/// If a file was mapped through a read-only descriptor before it was moved, the mapping shows the
/// old file, while reads and reports refer to the new one: overlayfs documents this. With the mount
/// option `metacopy=on`, a file of which only the attributes were changed has its data in a lower
/// layer and its attributes in the upper one. Only `FS_IOC_FIEMAP` is then answered by the file
/// system of the data, so a file without extents on an ext4 below is not recognized. A file that is
/// open for writing is never in this state.
///
/// The reports of these are not used, and everything counts as data:
///
/// - FUSE (including virtiofs) and network file systems, whose server decides.
/// - OpenZFS, f2fs, bcachefs and others, whose implementations are not examined.
/// - hugetlbfs, which reports no holes.
/// - Files without extents on ext4, ext3 and ext2.
/// - overlayfs over any of these and over tmpfs, which cannot be distinguished from a server.
/// - Block devices.
/// - Every file system of macOS.
///
/// # Errors
/// Returns a [`HolesUnknown`].
///
/// # Examples
/// ```
/// let file = tempfile::tempfile()?;
/// match sparse_file::check_holes_are_zeros(&file) {
///     Ok(()) => println!("holes can be skipped"),
///     Err(why) => println!("everything has to be read: {why}"),
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn check_holes_are_zeros(file: &File) -> Result<(), HolesUnknown> {
    if !file.metadata()?.is_file() {
        return Err(HolesUnknown::NotAFile);
    }
    if sys::reports_holes_correctly(file)? {
        return Ok(());
    }
    if sys::lacks_extents(file)? {
        return Err(HolesUnknown::NoExtents);
    }
    let file_system = file_system_name(file)?;
    Err(HolesUnknown::FileSystem { file_system })
}

/// Returns whether `file` is known to be stored on ext4, XFS or btrfs of Linux. This includes
/// overlayfs, by the evidence that [`check_holes_are_zeros`] lists. Such a file is in memory only
/// in the page cache, so no process can fill it by userfaultfd.
///
/// # Errors
/// Returns the errors of `fstatfs(2)`.
pub fn is_on_disk(file: &File) -> io::Result<bool> {
    sys::is_on_disk(file)
}

/// Returns the name of the file system of `file`, or its number in hexadecimal if this crate has no
/// name for it.
///
/// # Errors
/// Returns the errors of `fstatfs(2)`.
pub fn file_system_name(file: &File) -> io::Result<String> {
    sys::file_system_name(file)
}
