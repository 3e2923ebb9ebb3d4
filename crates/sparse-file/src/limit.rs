//! The process's file-size limit, asked before the kernel enforces it by a deadly signal.

use std::fs::File;
use std::io;

use nix::sys::resource::{Resource, getrlimit};

/// How large this process may make a file.
///
/// A write that starts at `RLIMIT_FSIZE`, or a size beyond it, raises `SIGXFSZ`, which ends the process unless
/// it ignores that signal (`setrlimit(2)`). So the limit is looked up first and the same `EFBIG` given without asking the
/// kernel: no signal disposition of the host program is touched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SizeLimit(u64);

impl SizeLimit {
    /// The limit in force for `file`: only regular files have one.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Ok(Self(u64::MAX));
        }
        let (soft, _hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
        Ok(Self(soft))
    }

    /// `EFBIG` where a write at `offset` would raise the signal; a write that only ends past the limit comes back short.
    pub(crate) fn allow_write_at(self, offset: u64) -> io::Result<()> {
        self.allow(offset < self.0)
    }

    /// The largest offset up to which bytes may be written.
    pub(crate) fn end(self) -> u64 {
        self.0
    }

    /// `EFBIG` where growing a file to `len` bytes would raise the signal.
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
