//! A forked child process.

use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// A fork of this process, killed and reaped on drop.
pub(crate) struct Child(pub(crate) Pid);

impl Child {
    /// Forks a child that calls `act`, keeps its result, and stops. If it is continued, it executes
    /// another program.
    ///
    /// # Safety
    /// `act` is async-signal-safe (no allocation, no lock, no panic), or no other thread of this
    /// process holds a lock.
    pub(crate) unsafe fn stopped_after<T>(act: impl FnOnce() -> T) -> Self {
        // SAFETY: the child calls `act`, which the caller vouches for, raise and exec.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                let child = Self(child);
                let stopped = waitpid(child.0, Some(WaitPidFlag::WUNTRACED)).unwrap();
                assert_eq!(stopped, WaitStatus::Stopped(child.0, Signal::SIGSTOP));
                child
            }
            ForkResult::Child => {
                // Ends the child if this process cannot kill it.
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                let _held = act();
                let _ = raise(Signal::SIGSTOP);
                run_another_program();
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.as_raw() as u32
    }

    /// Kills the child, and leaves a zombie process.
    pub(crate) fn kill_without_reaping(&self) {
        kill(self.0, Signal::SIGKILL).unwrap();
        waitid(Id::Pid(self.0), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

fn run_another_program() -> ! {
    let arguments = [c"sleep".as_ptr(), c"60".as_ptr(), std::ptr::null()];
    // SAFETY: both are async-signal-safe, and the arguments end with a null pointer.
    unsafe {
        libc::execv(c"/bin/sleep".as_ptr(), arguments.as_ptr());
        libc::_exit(127)
    }
}
