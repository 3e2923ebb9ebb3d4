//! `FS_IOC_FIEMAP`: the extents of a file, and which of them were written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Extents in one answer of the kernel: 14 KiB.
const EXTENTS: usize = 256;

/// `struct fiemap_extent` of `include/uapi/linux/fiemap.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with an array of extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS],
}

impl Default for Fiemap {
    fn default() -> Self {
        Self {
            start: 0,
            length: 0,
            flags: 0,
            mapped_extents: 0,
            extent_count: 0,
            reserved: 0,
            extents: [FiemapExtent::default(); EXTENTS],
        }
    }
}

pub(super) const FIEMAP_FLAG_XATTR: u32 = 0x2;
const FIEMAP_EXTENT_LAST: u32 = 0x1;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 0x800;
/// `_IOWR('f', 11, struct fiemap)`; the size in it is that of the header, 32 bytes.
const FS_IOC_FIEMAP: libc::Ioctl = 0xC020_660B_u32 as libc::Ioctl;

/// Returns the offset of the first extent of `file` that has blocks and was never written. Returns
/// `None` if there is none, or if the file system does not list extents: tmpfs.
pub(crate) fn first_unwritten(file: &File) -> io::Result<Option<u64>> {
    let len = file.metadata()?.len();
    let mut at = 0;
    while at < len {
        let mut map = Fiemap {
            start: at,
            length: len - at,
            extent_count: EXTENTS as u32,
            ..Fiemap::default()
        };
        // SAFETY: FS_IOC_FIEMAP reads and writes a fiemap with as many extents as `extent_count`
        // says, which `map` is for the length of the call; `file` is borrowed, so open.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
        match Errno::result(result) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) if crate::sys::is_unsupported(errno as i32) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        let found = &map.extents[..(map.mapped_extents as usize).min(EXTENTS)];
        let unwritten = found
            .iter()
            .find(|extent| extent.flags & FIEMAP_EXTENT_UNWRITTEN != 0);
        if let Some(extent) = unwritten {
            return Ok(Some(extent.logical));
        }
        let Some(last) = found.last() else { break };
        let end = last.logical.saturating_add(last.length);
        if last.flags & FIEMAP_EXTENT_LAST != 0 || end <= at {
            break;
        }
        at = end;
    }
    Ok(None)
}

/// Returns whether `FS_IOC_FIEMAP` with `flags` is supported. Lists no extent.
pub(super) fn has_fiemap(file: &File, flags: u32) -> bool {
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
