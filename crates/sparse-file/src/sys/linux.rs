//! Linux: fallocate, statx and statfs.

#![allow(unsafe_code)]

mod fiemap;
mod flags;
mod handle;
mod overlay;

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::{Statfs, fstatfs, statfs};

pub(crate) use fiemap::first_unwritten;
pub(crate) use flags::extent_size_hint;
pub(crate) use handle::{StoredHandle, stored_handle, stored_handle_at};

pub(crate) fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate_range(file, mode, range)
}

pub(crate) fn reserve(file: &File, len: u64) -> io::Result<()> {
    fallocate_range(file, FallocateFlags::empty(), 0..len)
}

#[allow(
    clippy::cast_possible_wrap,
    reason = "checked by the callers in space.rs"
)]
fn fallocate_range(file: &File, mode: FallocateFlags, range: Range<u64>) -> io::Result<()> {
    let (start, len) = (
        range.start as libc::off_t,
        (range.end - range.start) as libc::off_t,
    );
    loop {
        match fallocate(file, mode, start, len) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Shares blocks by `FICLONERANGE`. Every reason why blocks cannot be shared counts as
/// [unsupported](super::is_unsupported).
pub(crate) fn share_blocks(from: &File, to: &File, len: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: 0,
        src_length: len,
        dest_offset: 0,
    };
    // SAFETY: FICLONERANGE reads a file_clone_range, which `range` is for the length of the call;
    // both files are borrowed, so open.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    match Errno::result(result) {
        // Different file systems; a length that is not whole blocks; different kinds of files
        // (compressed, encrypted).
        Err(Errno::EXDEV | Errno::EINVAL | Errno::EPERM) => Err(Errno::EOPNOTSUPP.into()),
        result => Ok(result.map(drop)?),
    }
}

/// Returns 1: misaligned direct I/O fails, or the block size of the file system covers it.
pub(crate) fn least_direct_alignment() -> usize {
    1
}

/// Sets or clears `O_DIRECT`. Returns `EINVAL` if the file system does not support it.
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, on);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// Opens a second file description of the regular file behind `file`, for writing past the page
/// cache.
///
/// Has no more access than `file`: a file that is not open for writing, or open for appending only,
/// is refused.
pub(crate) fn reopen_direct(file: &File) -> io::Result<File> {
    let metadata = file.metadata()?;
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if !metadata.is_file()
        || flags & OFlag::O_ACCMODE == OFlag::O_RDONLY
        || flags.intersects(OFlag::O_APPEND | OFlag::O_PATH)
    {
        let why = "it is not a regular file that is open for writing at any offset";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let kept = flags & (OFlag::O_SYNC | OFlag::O_DSYNC);
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags((kept | OFlag::O_DIRECT).bits())
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let reopened = direct.metadata()?;
    // Another file system than procfs may be mounted at /proc.
    if (reopened.dev(), reopened.ino()) == (metadata.dev(), metadata.ino()) {
        Ok(direct)
    } else {
        Err(Errno::ESTALE.into())
    }
}

/// Returns the alignment of memory and offset for direct I/O in bytes by `STATX_DIOALIGN` (Linux
/// 6.1). `(0, 0)` means that the file does not support direct I/O, `None` that the kernel or the
/// file system does not report it.
pub(crate) fn reported_direct_alignment(file: &File) -> Option<(usize, usize)> {
    let statx = statx(file, libc::STATX_DIOALIGN)?;
    (statx.stx_mask & libc::STATX_DIOALIGN != 0).then_some((
        statx.stx_dio_mem_align as usize,
        statx.stx_dio_offset_align as usize,
    ))
}

/// Returns `None` if the kernel does not support `statx(2)`, or if it fails.
fn statx(file: &File, mask: libc::c_uint) -> Option<libc::statx> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string, which with AT_EMPTY_PATH selects the borrowed, so open,
    // descriptor; `buffer` is a statx that the kernel may fill.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            mask,
            buffer.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: `buffer` started as zeros, and statx is a struct of integers, for which every bit
    // pattern is valid.
    Some(unsafe { buffer.assume_init() })
}

/// Magic numbers that `statfs(2)` returns for current file systems, with the names of
/// `/proc/filesystems`. Source: `include/uapi/linux/magic.h`, and for those marked * the driver's
/// own source.
const NAMES: &[(u32, &str)] = &[
    (0xEF53, "ext2/ext3/ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58F6, "ramfs"),
    (0x9584_58F6, "hugetlbfs"),
    (0x6969, "nfs"),
    (0x794C_7630, "overlay"),
    (0x6573_5546, "fuse"),
    (0xF2F5_2010, "f2fs"),
    (0x2011_BAB0, "exfat"),
    (0x4D44, "vfat"),
    (0x482B, "hfsplus"),       // *
    (0x2FC1_2FC1, "zfs"),      // *
    (0xCA45_1A4E, "bcachefs"), // *
    (0x7366_746E, "ntfs3"),    // *
    (0x0102_1997, "9p"),
    (0xFF53_4D42, "cifs"),
    (0xFE53_4D42, "smb2"),
    (0x00C3_6400, "ceph"),
];

const EXT4: u32 = 0xEF53;

/// ext4, XFS, btrfs. Their reports of holes are used, and those of [`TMPFS`], on ext4 only of files
/// [with extents](flags::has_extents): see [`crate::check_holes_are_zeros`].
const DISK_FILE_SYSTEMS: [u32; 3] = [EXT4, 0x5846_5342, 0x9123_683E];

/// The number in [`NAMES`].
const TMPFS: u32 = 0x0102_1994;

/// The number in [`NAMES`].
const OVERLAY: u32 = 0x794C_7630;

/// Returns whether every range that the file's file system reports as a hole is known to read as
/// zeros.
pub(crate) fn reports_holes_correctly(file: &File) -> io::Result<bool> {
    Ok(match magic(file)? {
        TMPFS => true,
        EXT4 => flags::has_extents(file),
        OVERLAY => overlay::layer(file).is_some(),
        magic => DISK_FILE_SYSTEMS.contains(&magic),
    })
}

/// Returns whether the file is on ext4 itself (or ext2, ext3), and not known to have extents.
pub(crate) fn lacks_extents(file: &File) -> io::Result<bool> {
    Ok(magic(file)? == EXT4 && !flags::has_extents(file))
}

/// Returns whether the result of [`reports_holes_correctly`] may change while the file is open: the
/// file is moved to another layer (overlayfs), or its extents are removed (ext4: `chattr -e`).
pub(crate) fn may_change_reports(file: &File) -> io::Result<bool> {
    Ok(matches!(magic(file)?, OVERLAY | EXT4))
}

/// Returns whether the file is known to be stored on ext4, XFS or btrfs, including under overlayfs.
pub(crate) fn is_on_disk(file: &File) -> io::Result<bool> {
    let magic = magic(file)?;
    Ok(DISK_FILE_SYSTEMS.contains(&magic) || (magic == OVERLAY && overlay::layer(file).is_some()))
}

/// Returns whether the file is stored on another file system than it is accessed through. That file
/// system may change.
pub(crate) fn is_layered(file: &File) -> io::Result<bool> {
    Ok(magic(file)? == OVERLAY)
}

/// Returns the same for the file at `path`.
pub(crate) fn is_layered_at(path: &Path) -> io::Result<bool> {
    Ok(magic_of(&statfs(path)?) == OVERLAY)
}

/// Returns whether both files, which are [layered](is_layered), are stored on one file system, as
/// far as known.
pub(crate) fn on_one_layer(one: &File, other: &File) -> io::Result<bool> {
    // overlayfs assigns a device number per file system below (without `xino`).
    let one_device = one.metadata()?.dev() == other.metadata()?.dev();
    let layer = overlay::layer(one);
    Ok(one_device && layer.is_some() && layer == overlay::layer(other))
}

/// Returns the larger of the block sizes of the file system and of the file, in bytes. On a tmpfs
/// of huge pages the file's is a huge page, while the file system reports 4 KiB.
pub(crate) fn file_system_block(file: &File) -> io::Result<u64> {
    let of_file_system = u64::try_from(fstatfs(file)?.block_size()).map_err(io::Error::other)?;
    Ok(of_file_system.max(file.metadata()?.blksize()))
}

/// Mount options with which ext4 writes zeros into the rest of a small unwritten extent when a part
/// of it is written, as shown in `/proc/self/mountinfo` and `/proc/fs/ext4/DEVICE/options`
/// (`ext4_should_dioread_nolock`: without delayed allocation, ext4 ignores `dioread_nolock`).
const ZEROS_BESIDE: [&str; 4] = [
    "nodioread_nolock",
    "dioread_lock",
    "data=journal",
    "nodelalloc",
];

/// Returns the first of [`ZEROS_BESIDE`] that the mount of `file` has. Returns `None` if there is
/// none, or if the system does not report it, as for a file that overlayfs stores on ext4.
pub(crate) fn zeros_beside(file: &File) -> io::Result<Option<&'static str>> {
    if magic(file)? != EXT4 {
        return Ok(None);
    }
    let options = mount_id(file).and_then(|id| {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let is_it = |line: &&str| line.split(' ').next() == Some(id.as_str());
        let (_, of_file_system) = mounts.lines().find(is_it)?.split_once(" - ")?;
        Some(of_file_system.split(' ').nth(2)?.to_owned())
    });
    let lists = [options, all_ext4_options(file)?];
    let is_shown = |option: &&str| {
        let shown = lists
            .iter()
            .flatten()
            .flat_map(|list| list.split([',', '\n']));
        shown.into_iter().any(|shown| shown == *option)
    };
    Ok(ZEROS_BESIDE.into_iter().find(is_shown))
}

/// Returns the mount options of the ext4 of `file`, one a line, also those that the mounts do not
/// show: options that the superblock contains, or that are the kernel's default. Returns `None` if
/// the system does not report them.
fn all_ext4_options(file: &File) -> io::Result<Option<String>> {
    let device = file.metadata()?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let Ok(device) = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")) else {
        return Ok(None);
    };
    let name = device.file_name().unwrap_or_default();
    let options = Path::new("/proc/fs/ext4").join(name).join("options");
    Ok(std::fs::read_to_string(options).ok())
}

/// Returns the number of the mount through which the file was opened.
fn mount_id(file: &File) -> Option<String> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let mut lines = info.lines();
    let id = lines.find_map(|line| line.strip_prefix("mnt_id:"))?;
    Some(id.trim().to_owned())
}

/// Returns whether a file and a directory were opened through one mount. Compares their devices if
/// the system does not report the mounts.
pub(crate) fn on_one_mount(one: &File, other: &File) -> io::Result<bool> {
    let (one_mount, other_mount) = (mount_id(one), mount_id(other));
    if is_layered(one)? {
        // A directory and a file on one overlayfs may have different devices.
        return Ok(one_mount.is_some() && one_mount == other_mount);
    }
    Ok(one.metadata()?.dev() == other.metadata()?.dev() && one_mount == other_mount)
}

fn magic(file: &File) -> io::Result<u32> {
    Ok(magic_of(&fstatfs(file)?))
}

fn magic_of(file_system: &Statfs) -> u32 {
    // As wide as the field on every architecture; the upper half is a sign extension or zero.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let magic = file_system.filesystem_type().0 as u32;
    magic
}

pub(crate) fn file_system_name(file: &File) -> io::Result<String> {
    let magic = magic(file)?;
    let name = NAMES.iter().find(|(known, _)| *known == magic);
    Ok(name.map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).into()))
}
