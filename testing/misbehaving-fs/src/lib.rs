//! A FUSE file system that passes a directory through, and misbehaves as it is told to.
//!
//! File systems exist whose `SEEK_HOLE` and `SEEK_DATA` report holes where there is data. This one
//! does the same on demand, so that tests can show that no byte depends on it. The server is a
//! thread of the test's process. It passes regular files of one directory through; there are no
//! directories below it.
//!
//! ```no_run
//! use misbehaving_fs::{Behaviour, Lseek, MisbehavingFs};
//!
//! let fs = MisbehavingFs::mount(Behaviour::default())?;
//! std::fs::write(fs.path().join("image"), [7; 8192])?;
//! fs.set(Behaviour {
//!     lseek: Lseek::AllHole,
//!     ..Behaviour::default()
//! });
//! // lseek(SEEK_DATA) of the image is ENXIO from here on.
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

/// How the file system answers `SEEK_HOLE` and `SEEK_DATA`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lseek {
    /// As the file below answers. What was written through a mapping, or into the writeback cache,
    /// has not arrived there: the kernel does not write it back before it asks.
    #[default]
    Exact,
    /// All of the file is a hole: `SEEK_HOLE` returns the offset, `SEEK_DATA` fails with `ENXIO`.
    AllHole,
    /// `SEEK_HOLE` fails with `ENXIO` inside the file, as APFS does for clones.
    HoleIsEnxio,
    /// `SEEK_DATA` fails with `ENXIO` although there is data.
    DataIsEnxio,
}

/// How the file system answers reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// With all bytes that were asked for.
    #[default]
    Whole,
    /// With at most 1,000 bytes, past the page cache.
    Short,
    /// With `EIO` where the byte at this offset is asked for, past the page cache.
    FailAt(u64),
}

/// How the file system misbehaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// How it answers `SEEK_HOLE` and `SEEK_DATA`.
    pub lseek: Lseek,
    /// How it answers reads of files that are opened from then on.
    pub reads: Reads,
    /// Whether writes stay in the kernel until they are written back. Decided by the mount.
    pub writeback_cache: bool,
}

/// A mounted file system; unmounted and removed when dropped.
#[derive(Debug)]
pub struct MisbehavingFs {
    behaviour: Arc<Mutex<Behaviour>>,
    _session: BackgroundSession,
    mount_point: TempDir,
    below: TempDir,
}

impl MisbehavingFs {
    /// Mounts an empty file system.
    ///
    /// # Errors
    /// Where FUSE is missing, or the process may not mount: ask `test_machine::Need::Fuse` first.
    pub fn mount(behaviour: Behaviour) -> io::Result<Self> {
        let (below, mount_point) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let shared = Arc::new(Mutex::new(behaviour));
        let server = Server::new(below.path(), Arc::clone(&shared), behaviour.writeback_cache)?;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("misbehaving-fs".into())];
        let session = fuser::spawn_mount(server, mount_point.path(), &config)?;
        Ok(Self {
            behaviour: shared,
            _session: session,
            mount_point,
            below,
        })
    }

    /// Changes how it misbehaves from here on, except for the writeback cache.
    pub fn set(&self, behaviour: Behaviour) {
        *self
            .behaviour
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = behaviour;
    }

    /// The mounted directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount_point.path()
    }

    /// The directory that is passed through.
    #[must_use]
    pub fn below(&self) -> &Path {
        self.below.path()
    }
}

impl Drop for MisbehavingFs {
    /// Also ends what waits for the server: a process whose threads, the server among them, have
    /// ended would wait for ever to write back a mapping.
    fn drop(&mut self) {
        let force = MntFlags::MNT_FORCE | MntFlags::MNT_DETACH;
        // Then the mount stays, which the temporary directory reports by not going away.
        let _ = umount2(self.mount_point.path(), force);
    }
}
