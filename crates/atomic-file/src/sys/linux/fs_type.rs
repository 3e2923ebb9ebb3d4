//! The type of a file system, by its magic number.

use std::io;
use std::os::fd::AsFd;

use crate::retry::retry;

/// Returns the magic number of the file system.
pub(super) fn magic_of(fd: impl AsFd) -> io::Result<u32> {
    let fd = fd.as_fd();
    let statfs = retry(|| nix::sys::statfs::fstatfs(fd))?;
    // Magic numbers are 32 bits wide. The width and sign of the field differ between architectures.
    Ok(statfs.filesystem_type().0 as u32)
}
