//! The process at the other end of a connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use crate::server::VmProcess;

/// The time that a killed process gets to exit: it may be in a system call that waits for a disk.
const EXIT_LIMIT: u16 = 60_000;

/// A process, identified by a descriptor, so that it is never mistaken for another one with the
/// same id.
#[derive(Debug)]
pub(crate) struct PeerProcess {
    id: i32,
    descriptor: OwnedFd,
}

impl PeerProcess {
    /// Returns the process that has connected.
    ///
    /// # Errors
    /// Fails if it has exited, or is not visible in the PID namespace of this process.
    pub(crate) fn of(connection: &UnixStream) -> io::Result<Self> {
        let id = getsockopt(connection, sockopt::PeerCredentials)?.pid();
        if id <= 0 {
            let what = "the process is not visible here: run the server in the PID namespace of \
                        the VMM, or in one above it";
            return Err(io::Error::other(what));
        }
        // Linux 6.5.
        let descriptor = match getsockopt(connection, sockopt::PeerPidfd) {
            Ok(descriptor) => descriptor,
            Err(_) => open(id)?,
        };
        Ok(Self { id, descriptor })
    }

    /// Returns its id and the name of its command.
    pub(crate) fn named(&self) -> VmProcess {
        let command = std::fs::read(format!("/proc/{}/comm", self.id)).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        VmProcess {
            id: self.id,
            command: command.trim_end_matches('\n').to_owned(),
        }
    }

    /// Returns a descriptor that is readable once the process has exited.
    pub(crate) fn exit(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            id: self.id,
            descriptor: self.descriptor.try_clone()?,
        })
    }

    pub(crate) fn wait_for_exit(&self) {
        self.wait(PollTimeout::NONE);
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.wait(PollTimeout::ZERO)
    }

    fn wait(&self, limit: PollTimeout) -> bool {
        loop {
            let mut exit = [PollFd::new(self.exit(), PollFlags::POLLIN)];
            match poll(&mut exit, limit) {
                Err(Errno::EINTR) => {}
                polled => return polled.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Fails if this process may not kill the other one.
    pub(crate) fn check_may_kill(&self) -> io::Result<()> {
        match self.signal(0) {
            // It has exited.
            Err(Errno::ESRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Kills the process and waits until it has exited. Returns whether it has.
    pub(crate) fn kill(&self) -> bool {
        match self.signal(libc::SIGKILL) {
            Ok(()) => self.wait(PollTimeout::from(EXIT_LIMIT)),
            Err(errno) => errno == Errno::ESRCH,
        }
    }

    fn signal(&self, signal: i32) -> nix::Result<()> {
        send_signal(&self.descriptor, signal)
    }
}

use sys::{open, send_signal};

mod sys {
    #![allow(unsafe_code)]

    use super::*;

    pub(super) fn open(process: i32) -> nix::Result<OwnedFd> {
        // SAFETY: the call takes two numbers.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
        // SAFETY: a new descriptor, which has no other owner.
        Errno::result(opened).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    pub(super) fn send_signal(process: &OwnedFd, signal: i32) -> nix::Result<()> {
        let (process, info) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: the call takes a descriptor and numbers. Without information about the signal, it
        // is that of `kill`.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process, signal, info, 0) };
        Errno::result(sent).map(drop)
    }
}
