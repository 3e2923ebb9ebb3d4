//! Stopping the threads of another process. nix has no call that looks at a stop without taking it, and none for real-time signals.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ptr;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;

/// How a traced thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thread {
    Runs,
    /// With the number of the signal that it was just to be given, or 0.
    Stopped {
        signal: i32,
    },
    Ended,
}

/// Traces `thread`, which goes on, for as long as the calling thread lives.
pub(crate) fn seize(thread: Pid) -> nix::Result<()> {
    ptrace::seize(thread, Options::empty())
}

/// Has `thread` stop soon, unless something else stops it before.
pub(crate) fn interrupt(thread: Pid) -> nix::Result<()> {
    ptrace::interrupt(thread)
}

/// What `thread`, traced by the calling thread, does. It's looked at and not taken: a signal whose stop was taken would be lost, were
/// this process killed before it passes it on.
///
/// `ECHILD` where it isn't traced by this process.
pub(crate) fn state(thread: Pid) -> nix::Result<Thread> {
    wait(thread, libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT)
}

/// Has the kernel forget `thread` if it has ended, and says whether it's forgotten: then its id may be another's, this process's own child's
/// too. Not for the first of a process: that one is for its parent to wait for.
pub(crate) fn forget_ended(thread: Pid) -> bool {
    // Looked at first: a stop would be taken, whatever is asked for.
    match state(thread) {
        Ok(Thread::Ended) => wait(thread, libc::WEXITED).is_ok(),
        Ok(_) => false,
        Err(errno) => errno == Errno::ECHILD,
    }
}

fn wait(thread: Pid, flags: i32) -> nix::Result<Thread> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = flags | libc::WNOHANG | libc::__WALL;
    // SAFETY: writes at most the structure, which is this function's own.
    let result = unsafe {
        libc::waitid(
            libc::P_PID,
            thread.as_raw().cast_unsigned(),
            info.as_mut_ptr(),
            flags,
        )
    };
    Errno::result(result)?;
    // SAFETY: integers, zeroed above and filled by waitid where it has something to tell, with these two fields then.
    let (code, id, status) = unsafe {
        let info = info.assume_init();
        (info.si_code, info.si_pid(), info.si_status())
    };
    Ok(match (id, code) {
        (0, _) => Thread::Runs,
        // With an event in the second byte it's a stop of ptrace's own, and the rest no signal to be given.
        (_, libc::CLD_TRAPPED | libc::CLD_STOPPED) => Thread::Stopped {
            signal: if status >> 8 == 0 { status } else { 0 },
        },
        _ => Thread::Ended,
    })
}

/// Lets `thread`, which is stopped, go on with `signal`, or without where that is 0.
pub(crate) fn detach(thread: Pid, signal: i32) -> nix::Result<()> {
    let signal = ptr::without_provenance_mut::<libc::c_void>(signal as usize);
    let no_address = ptr::null_mut::<libc::c_void>();
    // SAFETY: the request takes the signal's number in the place of a pointer, and has no effect on this process's memory.
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

    use test_machine::Need;

    use super::*;

    /// Traced by this thread, not interrupted, and stopped where a real-time signal was to end it.
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
    fn a_signal_that_stopped_a_thread_is_passed_on_when_it_is_let_go() {
        if !Need::Ptrace.met("a_signal_that_stopped_a_thread_is_passed_on_when_it_is_let_go") {
            return;
        }
        let (mut child, signal) = stopped_at_a_signal();
        detach(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
    }

    #[test]
    fn a_signal_that_stopped_a_thread_is_not_lost_when_the_tracer_dies() {
        if !Need::Ptrace.met("a_signal_that_stopped_a_thread_is_not_lost_when_the_tracer_dies") {
            return;
        }
        let (mut child, signal) = thread::spawn(stopped_at_a_signal).join().unwrap();
        // The thread is joined a moment before the kernel lets go of what it traced.
        let mut end = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut end).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
    }
}
