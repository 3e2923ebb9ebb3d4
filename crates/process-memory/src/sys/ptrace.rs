//! Stopping the threads of another process.
//!
//! nix has no call that peeks at a stop without consuming it, and does not support real-time
//! signals.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ptr;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;

/// The state of a traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thread {
    Runs,
    /// The thread is stopped. `signal` is the number of the signal that was about to be delivered,
    /// or 0.
    Stopped {
        signal: i32,
    },
    Ended,
}

/// Traces `thread`, without stopping it, until the calling thread ends.
pub(crate) fn seize(thread: Pid) -> nix::Result<()> {
    ptrace::seize(thread, Options::empty())
}

/// Requests that `thread` stops.
pub(crate) fn interrupt(thread: Pid) -> nix::Result<()> {
    ptrace::interrupt(thread)
}

/// Returns the state of `thread`, which the calling thread traces.
///
/// The stop is not consumed: the signal of a consumed stop would be lost if this process were
/// killed before it passes the signal on.
///
/// # Errors
/// Returns `ECHILD` if this process does not trace the thread.
pub(crate) fn state(thread: Pid) -> nix::Result<Thread> {
    wait(thread, libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT)
}

/// Reaps `thread` if it has ended. Returns `true` if it is no longer traced: then its id may be
/// reused, possibly by a child of this process.
///
/// Must not be called for the first thread of a process, which is reaped by the parent of the
/// process.
pub(crate) fn reap_exited(thread: Pid) -> bool {
    // Peek first: waitid would also consume a stop.
    match state(thread) {
        Ok(Thread::Ended) => wait(thread, libc::WEXITED).is_ok(),
        Ok(_) => false,
        Err(errno) => errno == Errno::ECHILD,
    }
}

fn wait(thread: Pid, flags: i32) -> nix::Result<Thread> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = flags | libc::WNOHANG | libc::__WALL;
    // SAFETY: writes only the structure, a local variable.
    let result = unsafe {
        libc::waitid(
            libc::P_PID,
            thread.as_raw().cast_unsigned(),
            info.as_mut_ptr(),
            flags,
        )
    };
    Errno::result(result)?;
    // SAFETY: integers, zeroed above. If waitid reports a change, it sets these fields.
    let (code, id, status) = unsafe {
        let info = info.assume_init();
        (info.si_code, info.si_pid(), info.si_status())
    };
    Ok(match (id, code) {
        (0, _) => Thread::Runs,
        // An event in the second byte marks a stop of ptrace itself, without a signal to deliver.
        (_, libc::CLD_TRAPPED | libc::CLD_STOPPED) => Thread::Stopped {
            signal: if status >> 8 == 0 { status } else { 0 },
        },
        _ => Thread::Ended,
    })
}

/// Resumes the stopped `thread` and delivers `signal`, or none if it is 0.
pub(crate) fn detach(thread: Pid, signal: i32) -> nix::Result<()> {
    let signal = ptr::without_provenance_mut::<libc::c_void>(signal as usize);
    let no_address = ptr::null_mut::<libc::c_void>();
    // SAFETY: the request takes the number of the signal in place of a pointer, and does not access
    // memory of this process.
    let result = unsafe { libc::ptrace(libc::PTRACE_DETACH, thread.as_raw(), no_address, signal) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};
    use std::thread;
    use std::time::{Duration, Instant};

    use test_machine::needs;

    use super::*;

    /// Returns a child, traced by this thread, that stopped when a real-time signal was about to
    /// end it.
    fn stopped_at_a_signal() -> (Child, i32) {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().unwrap();
        let id = Pid::from_raw(child.id() as i32);
        seize(id).unwrap();
        let signal = libc::SIGRTMIN() + 3;
        // SAFETY: sends a signal to the process above.
        assert_eq!(unsafe { libc::kill(id.as_raw(), signal) }, 0);
        let start = Instant::now();
        while state(id).unwrap() == Thread::Runs {
            assert!(start.elapsed() < Duration::from_secs(60), "not stopped");
            thread::yield_now();
        }
        for _ in 0..2 {
            assert_eq!(state(id).unwrap(), Thread::Stopped { signal });
        }
        (child, signal)
    }

    #[test]
    fn detaching_delivers_the_signal_of_the_stop() {
        needs!(Ptrace);
        let (mut child, signal) = stopped_at_a_signal();
        detach(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
    }

    #[test]
    fn the_end_of_the_tracer_delivers_the_pending_signal() {
        needs!(Ptrace);
        let (mut child, signal) = thread::spawn(stopped_at_a_signal).join().unwrap();
        // The join returns shortly before the kernel detaches the traced threads.
        let mut end = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut end).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
    }
}
