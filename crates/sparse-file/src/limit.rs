//! Checks the process's file-size limit before the kernel enforces it by a fatal signal.

use std::fs::File;
use std::io;

use nix::sys::resource::{Resource, getrlimit};

/// The maximum length to which this process may grow a file.
///
/// A write that starts at `RLIMIT_FSIZE`, or a size beyond it, raises `SIGXFSZ`, which ends the
/// process unless it ignores that signal (`setrlimit(2)`). The limit is therefore checked first,
/// and the same `EFBIG` is returned without the system call. The signal disposition of the host
/// program is not changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SizeLimit(u64);

impl SizeLimit {
    /// Returns the limit for `file`. Only regular files have one.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Ok(Self(u64::MAX));
        }
        let (soft, _hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
        Ok(Self(soft))
    }

    /// Returns `EFBIG` if a write at `offset` would raise the signal. A write that only ends past
    /// the limit is short.
    pub(crate) fn allow_write_at(self, offset: u64) -> io::Result<()> {
        self.allow(offset < self.0)
    }

    /// Returns the largest offset up to which bytes may be written.
    pub(crate) fn end(self) -> u64 {
        self.0
    }

    /// Returns `EFBIG` if growing a file to `len` bytes would raise the signal.
    pub(crate) fn allow_len(self, len: u64) -> io::Result<()> {
        self.allow(len <= self.0)
    }

    fn allow(self, allowed: bool) -> io::Result<()> {
        if allowed {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EFBIG))
        }
    }
}
