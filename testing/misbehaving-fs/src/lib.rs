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

mod server;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackgroundSession, Config, MountOption};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use server::Server;

/// The results of `SEEK_HOLE` and `SEEK_DATA`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lseek {
    /// Those of the underlying file. Data that was written through a mapping or to the writeback
    /// cache is missing there, because the kernel does not write it back before it sends the
    /// request.
    #[default]
    Exact,
    /// The whole file is a hole: `SEEK_HOLE` returns the offset, `SEEK_DATA` fails with `ENXIO`.
    AllHole,
    /// `SEEK_HOLE` fails with `ENXIO` inside the file, like on APFS for clones.
    HoleIsEnxio,
    /// `SEEK_DATA` fails with `ENXIO` although there is data.
    DataIsEnxio,
}

/// The results of reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// All requested bytes.
    #[default]
    Whole,
    /// At most 1,000 bytes. Bypasses the page cache.
    Short,
    /// `EIO` if the read includes the byte at this offset. Bypasses the page cache.
    FailAt(u64),
}

/// The behavior of the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behavior {
    /// The results of `SEEK_HOLE` and `SEEK_DATA`.
    pub lseek: Lseek,
    /// The results of reads, for files that are opened from now on.
    pub reads: Reads,
    /// Whether the kernel caches writes until it writes them back. Determined when the file system
    /// is mounted.
    pub writeback_cache: bool,
}

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
