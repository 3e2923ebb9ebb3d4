//! macOS: fcntl's F_PUNCHHOLE, F_PREALLOCATE and F_NOCACHE, and statfs. Type-checked, never run.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::statfs::fstatfs;

/// Punches a hole by `F_PUNCHHOLE`, which refuses a range that is not of whole blocks. Parts of
/// blocks at both ends are therefore overwritten with zeros.
pub(crate) fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    let block = u64::from(fstatfs(file)?.block_size()).max(1);
    let start = range.start.next_multiple_of(block).min(range.end);
    let end = (range.end - range.end % block).max(start);
    // First, so that an unsupported call changes no bytes.
    if start < end {
        punch_blocks(file, start..end)?;
    }
    write_zeros(file, range.start..start)?;
    write_zeros(file, end..range.end)
}

#[allow(
    clippy::cast_possible_wrap,
    reason = "checked by the callers in space.rs"
)]
fn punch_blocks(file: &File, blocks: Range<u64>) -> io::Result<()> {
    let hole = libc::fpunchhole_t {
        fp_flags: 0,
        reserved: 0,
        fp_offset: blocks.start as libc::off_t,
        fp_length: (blocks.end - blocks.start) as libc::off_t,
    };
    // SAFETY: F_PUNCHHOLE reads an fpunchhole_t, which `hole` is for the length of the call; `file`
    // is borrowed, so open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_PUNCHHOLE, &raw const hole) };
    Errno::result(result)?;
    Ok(())
}

/// Unsupported: APFS clones only whole files, to new names.
pub(crate) fn share_blocks(_from: &File, _to: &File, _len: u64) -> io::Result<()> {
    Err(Errno::ENOTSUP.into())
}

fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    let zeros = [0; 4096];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).map_or(zeros.len(), |len| len.min(zeros.len()));
        file.write_all_at(&zeros[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// The length of `F_PREALLOCATE` is what to add after the present blocks of the file. It does not
/// change the length of the file.
#[allow(
    clippy::cast_possible_wrap,
    reason = "checked by the callers in space.rs"
)]
pub(crate) fn reserve(file: &File, len: u64) -> io::Result<()> {
    let metadata = file.metadata()?;
    let owned = metadata.len().max(metadata.blocks() * 512);
    if len > owned {
        let mut store = libc::fstore_t {
            fst_flags: libc::F_ALLOCATEALL,
            fst_posmode: libc::F_PEOFPOSMODE,
            fst_offset: 0,
            fst_length: (len - owned) as libc::off_t,
            fst_bytesalloc: 0,
        };
        match fcntl(file, FcntlArg::F_PREALLOCATE(&mut store)) {
            // APFS returns this for valid arguments: for some new files, and where more is
            // allocated than was asked for.
            Err(Errno::EINVAL) => return Err(Errno::ENOTSUP.into()),
            result => result?,
        };
    }
    if len > metadata.len() {
        file.set_len(len)?;
    }
    Ok(())
}

/// Returns the page size: I/O that is not aligned to pages succeeds through the page cache, despite
/// `F_NOCACHE`.
pub(crate) fn least_direct_alignment() -> usize {
    super::page_size()
}

/// Sets or clears `F_NOCACHE`: macOS has no `O_DIRECT`.
pub(crate) fn set_direct(file: &File, on: bool) -> io::Result<()> {
    // SAFETY: F_NOCACHE takes an int by value; `file` is borrowed, so the descriptor is open.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, libc::c_int::from(on)) };
    Errno::result(result)?;
    Ok(())
}

/// Sets `F_NOCACHE` on a file until it is dropped. The previous state cannot be queried, so it is
/// cleared on drop.
#[derive(Debug)]
pub(crate) struct Uncached<'f>(&'f File);

impl<'f> Uncached<'f> {
    /// Sets `F_NOCACHE` as a hint: a file that does not support it is written without.
    pub(crate) fn new(file: &'f File) -> Self {
        let _ = set_direct(file, true);
        Self(file)
    }
}

impl Drop for Uncached<'_> {
    fn drop(&mut self) {
        let _ = set_direct(self.0, false);
    }
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
