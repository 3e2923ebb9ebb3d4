//! The socket that VMMs connect to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::sys::stat::{Mode, umask};

use super::systemd;
use crate::failure::Failure;
use crate::print;

/// A socket that is listened on. One that was created is removed on drop.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    created: Option<Created>,
}

/// The file of a socket: its path, device and inode.
#[derive(Debug)]
struct Created {
    path: PathBuf,
    identity: (u64, u64),
}

impl Socket {
    /// Creates a socket at `path`, in place of one that no process listens on.
    pub fn create(path: &Path, mode: u32) -> anyhow::Result<Self> {
        remove_stale(path)?;
        let failed = || format!("cannot create the socket {path:?}");
        let listener = bind(path, mode).with_context(failed)?;
        listener.set_nonblocking(true).with_context(failed)?;
        let metadata = fs::symlink_metadata(path).with_context(failed)?;
        let created = Created {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        Ok(Self {
            listener,
            created: Some(created),
        })
    }

    /// Returns the socket that systemd has passed.
    pub fn passed() -> anyhow::Result<Self> {
        let listener = systemd::socket()?.ok_or(Failure::NoSocket)?;
        let listening = listener.set_nonblocking(true);
        listening.context("cannot use the socket that was passed (LISTEN_FDS)")?;
        Ok(Self {
            listener,
            created: None,
        })
    }

    /// Returns its name for messages.
    pub fn name(&self) -> String {
        match &self.created {
            Some(created) => print::path(&created.path),
            None => "the passed socket".to_owned(),
        }
    }

    /// Accepts a connection. Returns `None` if none waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((connection, _)) => Ok(Some(connection)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Socket {
    /// Removes the file of a socket that was created, so that no process can connect any more.
    /// Connections that wait are still to be accepted. Returns false for a passed socket: its
    /// connections wait for the next start.
    pub fn withdraw(&self) -> bool {
        let Some(Created { path, identity }) = &self.created else {
            return false;
        };
        let found = fs::symlink_metadata(path);
        // Another server may have created its own there.
        if found.is_ok_and(|found| (found.dev(), found.ino()) == *identity) {
            let _ = fs::remove_file(path);
        }
        true
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// Removes a socket that no process listens on. Refuses anything else.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.with_context(|| format!("cannot look at {path:?}"))?,
    };
    let path_buf = path.to_owned();
    if !found.file_type().is_socket() {
        return Err(Failure::NotASocket { path: path_buf }.into());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .with_context(|| format!("cannot remove the socket {path:?}, which is not in use")),
        _ => Err(Failure::SocketInUse { path: path_buf }.into()),
    }
}

/// Creates a socket with this mode, so that at no time others may connect.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let before = umask(Mode::from_bits_truncate(!mode & 0o777));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}
