//! Linux: fallocate, statx and statfs.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::statfs::fstatfs;

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

/// `FICLONERANGE`. What can't be shared is [unsupported](super::is_unsupported), for whatever reason.
pub(crate) fn share_blocks(from: &File, to: &File, len: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: 0,
        src_length: len,
        dest_offset: 0,
    };
    // SAFETY: FICLONERANGE reads a file_clone_range, which `range` is for the length of the call; both files are borrowed, so open.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    match Errno::result(result) {
        // Of another file system; of odd length; files of different kinds (compressed, encrypted) on one.
        Err(Errno::EXDEV | Errno::EINVAL | Errno::EPERM) => Err(Errno::EOPNOTSUPP.into()),
        result => Ok(result.map(drop)?),
    }
}

/// Turns `O_DIRECT` on or off; `EINVAL` where the file system has none.
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, on);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// A second open file description of the regular file behind `file`, for writing past the page cache.
///
/// It takes over no more than `file` may do: one that is not open for writing, or for appending only, is refused.
pub(crate) fn reopen_direct(file: &File) -> io::Result<File> {
    let metadata = file.metadata()?;
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if !metadata.is_file()
        || flags & OFlag::O_ACCMODE == OFlag::O_RDONLY
        || flags.intersects(OFlag::O_APPEND | OFlag::O_PATH)
    {
        return Err(Errno::EINVAL.into());
    }
    let kept = flags & (OFlag::O_SYNC | OFlag::O_DSYNC);
    let direct = OpenOptions::new()
        .write(true)
        .custom_flags((kept | OFlag::O_DIRECT).bits())
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let reopened = direct.metadata()?;
    // What is mounted at /proc may be something else.
    if (reopened.dev(), reopened.ino()) == (metadata.dev(), metadata.ino()) {
        Ok(direct)
    } else {
        Err(Errno::ESTALE.into())
    }
}

/// Memory and offset alignment of direct I/O in bytes by `STATX_DIOALIGN` (Linux 6.1): `(0, 0)` says that the file has no
/// direct I/O, `None` that kernel or file system don't tell.
pub(crate) fn reported_direct_alignment(file: &File) -> Option<(usize, usize)> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a C string, which with AT_EMPTY_PATH makes the borrowed, so open, descriptor the object;
    // `buffer` is a statx that the kernel may fill.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            buffer.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: `buffer` started as zeros, and statx is a struct of integers, for which every bit pattern is valid.
    let statx = unsafe { buffer.assume_init() };
    (statx.stx_mask & libc::STATX_DIOALIGN != 0).then_some((
        statx.stx_dio_mem_align as usize,
        statx.stx_dio_offset_align as usize,
    ))
}

/// Magic numbers of `statfs(2)` that file systems of this day give; names as in `/proc/filesystems`.
/// Source: `include/uapi/linux/magic.h`, and for those marked * the driver's own source.
const NAMES: &[(u32, &str)] = &[
    (0xEF53, "ext2/ext3/ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58F6, "ramfs"),
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

pub(crate) fn file_system_name(file: &File) -> io::Result<String> {
    // As wide as the field is on every architecture; the upper half is sign or nothing.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let magic = fstatfs(file)?.filesystem_type().0 as u32;
    let name = NAMES.iter().find(|(known, _)| *known == magic);
    Ok(name.map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).into()))
}
