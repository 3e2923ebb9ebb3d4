//! Errors of files in `/proc`.

use std::io;

use nix::errno::Errno;

/// Returns `true` for an error that `/proc` returns for a process that has ended, by path or by an
/// open file.
pub(crate) fn is_not_found(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}
