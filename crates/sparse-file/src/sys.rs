//! System calls that differ by platform. The callers have checked that lengths and offsets fit
//! `off_t`.

use std::io;

use nix::unistd::{SysconfVar, sysconf};

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;
#[cfg(any(target_os = "macos", test))]
mod macos_calls;

#[cfg(target_os = "linux")]
pub(crate) use linux::{StoredHandle, stored_handle, stored_handle_at};
#[cfg(target_os = "linux")]
pub(crate) use linux::{
    extent_size_hint, file_system_block, file_system_name, first_unwritten, is_layered,
    is_layered_at, is_on_disk, lacks_extents, least_direct_alignment, may_change_reports,
    on_one_layer, on_one_mount, punch_hole, reopen_direct, reported_direct_alignment,
    reports_holes_correctly, reserve, set_direct, share_blocks, zeros_beside,
};
#[cfg(target_os = "macos")]
pub(crate) use macos::{StoredHandle, stored_handle, stored_handle_at};
#[cfg(target_os = "macos")]
pub(crate) use macos::{
    extent_size_hint, file_system_block, file_system_name, first_unwritten, is_layered,
    is_layered_at, is_on_disk, lacks_extents, least_direct_alignment, may_change_reports,
    on_one_layer, on_one_mount, punch_hole, reopen_direct, reported_direct_alignment,
    reports_holes_correctly, reserve, set_direct, share_blocks, zeros_beside,
};

#[cfg(target_os = "macos")]
pub(crate) use macos_calls::Uncached;

/// Returns the page size of the processor in bytes.
pub(crate) fn page_size() -> usize {
    // Falls back to 4096 if the system reports none, which POSIX does not permit.
    sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(4096)
}

/// Returns whether an error number means that the file system or the kernel does not support an
/// operation. This is the only list of these numbers in the crate:
///
/// - `EOPNOTSUPP` and `ENOTSUP` (one number on Linux, two on macOS): the file system does not
///   support the operation.
/// - `ENOSYS`: the kernel, or a FUSE server, does not support the call.
/// - `ENOTTY`: the file system does not support the `ioctl`.
pub(crate) fn is_unsupported(errno: i32) -> bool {
    let unsupported = [libc::EOPNOTSUPP, libc::ENOTSUP, libc::ENOSYS, libc::ENOTTY];
    unsupported.contains(&errno)
}

/// Returns whether an error means that the file system or the kernel does not support an argument
/// of a call: [`is_unsupported`], or `EINVAL`.
///
/// `EINVAL` is ambiguous. Use this only where all other arguments are known to be valid: for
/// `O_DIRECT` and the alignments of direct I/O, and for `SEEK_HOLE`.
pub(crate) fn is_unsupported_argument(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| errno == libc::EINVAL || is_unsupported(errno))
}
