//! macOS: fcntl's F_PUNCHHOLE, F_PREALLOCATE and F_NOCACHE, and statfs. Type-checked, never run.
//! The decisions are in `macos_calls`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statfs::fstatfs;

use super::macos_calls::{self, Calls, Sizes};

impl Calls for File {
    fn sizes(&self) -> io::Result<Sizes> {
        let metadata = self.metadata()?;
        Ok(Sizes {
            len: metadata.len(),
            allocated: metadata.blocks() * 512,
        })
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn put(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn block_size(&self) -> io::Result<u64> {
        file_system_block(self)
    }

    #[allow(
        clippy::cast_possible_wrap,
        reason = "checked by the callers in space.rs"
    )]
    fn punch(&self, blocks: Range<u64>) -> Result<(), Errno> {
        let hole = libc::fpunchhole_t {
            fp_flags: 0,
            reserved: 0,
            fp_offset: blocks.start as libc::off_t,
            fp_length: (blocks.end - blocks.start) as libc::off_t,
        };
        // SAFETY: F_PUNCHHOLE reads an fpunchhole_t, which `hole` is for the length of the call;
        // `self` is open.
        let result = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) };
        Errno::result(result).map(drop)
    }

    #[allow(
        clippy::cast_possible_wrap,
        reason = "checked by the callers in space.rs"
    )]
    fn preallocate(&self, more: u64) -> Result<(), Errno> {
        let mut store = libc::fstore_t {
            fst_flags: libc::F_ALLOCATEALL,
            fst_posmode: libc::F_PEOFPOSMODE,
            fst_offset: 0,
            fst_length: more as libc::off_t,
            fst_bytesalloc: 0,
        };
        fcntl(self, FcntlArg::F_PREALLOCATE(&mut store)).map(drop)
    }

    fn set_uncached(&self, on: bool) -> Result<(), Errno> {
        let on = libc::c_int::from(on);
        // SAFETY: F_NOCACHE takes an int by value; `self` is open.
        let result = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_NOCACHE, on) };
        Errno::result(result).map(drop)
    }
}

pub(crate) fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    macos_calls::punch_hole(file, range)
}

pub(crate) fn reserve(file: &File, len: u64) -> io::Result<()> {
    macos_calls::reserve(file, len)
}

/// Unsupported: APFS clones only whole files, to new names.
pub(crate) fn share_blocks(_from: &File, _to: &File, _len: u64) -> io::Result<()> {
    Err(Errno::ENOTSUP.into())
}

/// Returns the page size: I/O that is not aligned to pages succeeds through the page cache, despite
/// `F_NOCACHE`.
pub(crate) fn least_direct_alignment() -> usize {
    super::page_size()
}

/// Sets or clears `F_NOCACHE`: macOS has no `O_DIRECT`.
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<()> {
    Ok(file.set_uncached(on)?)
}

/// Unsupported: macOS opens a second description of a file only by its path.
pub(crate) fn reopen_direct(_file: &File) -> io::Result<File> {
    Err(Errno::ENOTSUP.into())
}

/// Returns `None`: macOS reports no alignment.
pub(crate) fn reported_direct_alignment(_file: &File) -> Option<(usize, usize)> {
    None
}

/// Returns false: APFS returns ENXIO inside clones, and has reported holes where data was written
/// through a mapping.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn reports_holes_correctly(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns false: no file system of macOS is ext4.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn lacks_extents(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns false: [`reports_holes_correctly`] is always false.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn may_change_reports(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns false: unknown for the file systems of macOS.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn is_on_disk(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns false: no file system of macOS is layered.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn is_layered(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns false: no file system of macOS is layered.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn is_layered_at(_path: &std::path::Path) -> io::Result<bool> {
    Ok(false)
}

/// Has no values: no file system of macOS is layered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoredHandle {}

/// Returns `None`: device and inode number identify a file.
pub(crate) fn stored_handle(_file: &File, _layered: bool) -> Option<StoredHandle> {
    None
}

/// Returns `None`: device and inode number identify a file.
pub(crate) fn stored_handle_at(_path: &std::path::Path, _layered: bool) -> Option<StoredHandle> {
    None
}

/// Not called, because no file is layered.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn on_one_layer(_one: &File, _other: &File) -> io::Result<bool> {
    Ok(false)
}

/// Returns the block size of the file system in bytes.
pub(crate) fn file_system_block(file: &File) -> io::Result<u64> {
    Ok(u64::from(fstatfs(file)?.block_size()))
}

/// Returns `None`: applies to ext4 only.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn zeros_beside(_file: &File) -> io::Result<Option<&'static str>> {
    Ok(None)
}

/// Returns `None`: applies to XFS only.
pub(crate) fn extent_size_hint(_file: &File) -> Option<u32> {
    None
}

/// Returns `None`: macOS does not list extents.
#[allow(clippy::unnecessary_wraps, reason = "the signature is Linux's")]
pub(crate) fn first_unwritten(_file: &File) -> io::Result<Option<u64>> {
    Ok(None)
}

/// macOS does not mount single files.
pub(crate) fn on_one_mount(one: &File, other: &File) -> io::Result<bool> {
    Ok(one.metadata()?.dev() == other.metadata()?.dev())
}

pub(crate) fn file_system_name(file: &File) -> io::Result<String> {
    Ok(fstatfs(file)?.filesystem_type_name().into())
}
