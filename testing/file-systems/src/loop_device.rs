//! Loop devices.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::tool::{run, tool};

/// A loop device over a file. The kernel detaches it when it is closed here and no longer mounted,
/// also if this process is killed.
#[derive(Debug)]
pub struct LoopDevice {
    path: String,
    _open: File,
}

impl LoopDevice {
    /// Attaches a device over the first `limit` bytes of `file`, or over all of it, in sectors of
    /// 512 bytes.
    ///
    /// # Errors
    /// The output of `losetup`, or the error of opening the device.
    pub fn over(file: &Path, limit: Option<u64>) -> io::Result<Self> {
        Self::with_sectors(file, limit, 512)
    }

    /// Attaches a device like [`over`](Self::over) in sectors of 512 to 4096 bytes.
    ///
    /// # Errors
    /// As [`over`](Self::over).
    pub fn with_sectors(file: &Path, limit: Option<u64>, bytes: u32) -> io::Result<Self> {
        let mut losetup = tool("losetup");
        losetup.args(["--find", "--show", "--sector-size", &bytes.to_string()]);
        if let Some(limit) = limit {
            losetup.args(["--sizelimit", &limit.to_string()]);
        }
        let path = run(losetup.arg(file))?.trim_end().to_owned();
        let open = File::open(&path)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot open {path}: {error}")));
        // It is open: the kernel detaches it when the last user closes it.
        run(tool("losetup").args(["--detach", &path]))?;
        Ok(Self { path, _open: open? })
    }

    /// Returns the path of the device.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the name of the device, without its directory.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.trim_start_matches("/dev/")
    }
}
