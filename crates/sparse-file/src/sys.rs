//! The calls that differ by platform. Lengths and offsets have been checked to fit `off_t`.

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "macos")]
mod macos;

#[cfg(target_os = "linux")]
pub(crate) use linux::{
    file_system_name, punch_hole, reported_direct_alignment, reserve, set_direct,
};
#[cfg(target_os = "macos")]
pub(crate) use macos::{
    file_system_name, punch_hole, reported_direct_alignment, reserve, set_direct,
};

/// Whether an error number says that the file system or the kernel has no such operation.
pub(crate) fn is_unsupported(errno: i32) -> bool {
    // ENOTSUP and EOPNOTSUPP are one number on Linux and two on macOS.
    errno == libc::EOPNOTSUPP || [libc::ENOTSUP, libc::ENOSYS, libc::ENOTTY].contains(&errno)
}
