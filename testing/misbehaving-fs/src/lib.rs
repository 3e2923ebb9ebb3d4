//! A FUSE file system for tests that passes a directory through and misbehaves on request.
//!
//! Some file systems report holes with `SEEK_HOLE` and `SEEK_DATA` where a file has data. This one
//! does so on demand, so that tests can show that no byte depends on such reports. The server is a
//! thread of the test's process. It passes the regular files of one directory through, without
//! subdirectories.
//!
//! ```no_run
//! use misbehaving_fs::{Behavior, Lseek, MisbehavingFs};
//!
//! let fs = MisbehavingFs::mount(Behavior::default())?;
//! std::fs::write(fs.path().join("image"), [7; 8192])?;
//! fs.set(Behavior {
//!     lseek: Lseek::AllHole,
//!     ..Behavior::default()
//! });
//! // From now on, lseek(SEEK_DATA) of the image fails with ENXIO.
//! # Ok::<(), std::io::Error>(())
//! ```
#![cfg(target_os = "linux")]

mod behavior;
mod server;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackgroundSession, Config, MountOption};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

pub use behavior::{Behavior, Lseek, Reads};
use server::Server;

/// A mounted file system, unmounted and removed on drop.
#[derive(Debug)]
pub struct MisbehavingFs {
    behavior: Arc<Mutex<Behavior>>,
    _session: BackgroundSession,
    mount_point: TempDir,
    below: TempDir,
}

impl MisbehavingFs {
    /// Mounts an empty file system.
    ///
    /// # Errors
    /// Returns an error if FUSE is missing or the process may not mount. Check
    /// `test_machine::Need::Fuse` first.
    pub fn mount(behavior: Behavior) -> io::Result<Self> {
        let (below, mount_point) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let shared = Arc::new(Mutex::new(behavior));
        let server = Server::new(below.path(), Arc::clone(&shared), behavior.writeback_cache)?;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("misbehaving-fs".into())];
        let session = fuser::spawn_mount(server, mount_point.path(), &config)?;
        Ok(Self {
            behavior: shared,
            _session: session,
            mount_point,
            below,
        })
    }

    /// Changes the behavior from now on, except for the writeback cache.
    pub fn set(&self, behavior: Behavior) {
        *self.behavior.lock().unwrap_or_else(PoisonError::into_inner) = behavior;
    }

    /// Returns the mounted directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount_point.path()
    }

    /// Returns the underlying directory.
    #[must_use]
    pub fn below(&self) -> &Path {
        self.below.path()
    }
}

impl Drop for MisbehavingFs {
    /// Unmounts by force, which also ends waiting requests. Otherwise a process whose threads have
    /// ended, the server among them, would never finish writing back a mapping.
    fn drop(&mut self) {
        let force = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        // If this fails, the mount remains, and the temporary directory is not removed.
        let _ = umount2(self.mount_point.path(), force);
    }
}
