//! Stops all threads of a process. This code runs on the tracing thread.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

use super::error::{ProcessStopError, Unresponsive};
use crate::proc_error::is_not_found;
use crate::sys::ptrace;

/// The number of tries for a process that seems to have ended.
///
/// A process that starts to execute another program seems to be gone, or out of reach, for a
/// moment: its first thread has ended, and another takes its place.
pub(super) const TRIES: u32 = 3;

/// The initial interval between two polls.
const FIRST_POLL: Duration = Duration::from_micros(20);

/// The threads of a process, as seen by the tracing thread.
pub(super) struct Threads {
    pid: u32,
    /// The first thread, whose id is the process id.
    pub(super) first: Pid,
    within: Duration,
    deadline: Instant,
    known: BTreeMap<Pid, Tracking>,
    /// All threads that were traced and not reaped. Locked while one is reaped.
    pub(super) shared: Arc<Mutex<Vec<Pid>>>,
}

/// The tracing state of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tracking {
    Traced(ptrace::Thread),
    /// The thread ended before it could be traced. Its id may be reused for a new thread.
    Ended,
}

impl Threads {
    pub(super) fn of(pid: u32, within: Duration) -> Self {
        Self {
            pid,
            first: Pid::from_raw(pid.cast_signed()),
            within,
            deadline: Instant::now() + within,
            known: BTreeMap::new(),
            shared: Arc::default(),
        }
    }

    fn shared(&self) -> MutexGuard<'_, Vec<Pid>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops all threads, and returns their number.
    ///
    /// Running threads create new ones. No further thread can exist once a list of threads is taken
    /// while all known threads are stopped, the list has as many entries as the kernel counts, and
    /// no entry is new or about to end.
    pub(super) fn stop(&mut self) -> Result<usize, ProcessStopError> {
        loop {
            let in_flux = self.trace_all()?;
            let (stopped, lost_some) = self.wait_for_all()?;
            match (stopped, in_flux || lost_some) {
                (_, true) if self.deadline <= Instant::now() => {
                    return Err(self.unresponsive(self.first));
                }
                (_, true) => thread::sleep(FIRST_POLL),
                (0, false) => return Err(ProcessStopError::Gone { pid: self.pid }),
                (stopped, false) => return Ok(stopped),
            }
        }
    }

    /// Traces all listed threads, and returns `true` if there may be others.
    ///
    /// There may be others if an entry was new or is ending, or if the list is incomplete. The
    /// kernel ends the list early at a thread that ends while the list is taken, and may or may not
    /// include that thread. Only the first thread stays listed for as long as there are others.
    fn trace_all(&mut self) -> Result<bool, ProcessStopError> {
        let list = self.list()?;
        let mut in_flux = status(self.pid, None)?.threads != list.len();
        for thread in list {
            let known = self.known.get(&thread).copied();
            if matches!(known, Some(Tracking::Traced(_))) {
                continue;
            }
            let now = self.trace(thread)?;
            in_flux |= known != Some(now) || (now == Tracking::Ended && thread != self.first);
            self.known.insert(thread, now);
        }
        Ok(in_flux)
    }

    fn list(&self) -> Result<Vec<Pid>, ProcessStopError> {
        let pid = self.pid;
        let list = || -> io::Result<Vec<_>> {
            let mut threads = Vec::new();
            for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
                let name = entry?.file_name();
                let thread = name.to_str().and_then(|name| name.parse().ok());
                threads.extend(thread.map(Pid::from_raw));
            }
            Ok(threads)
        };
        list().map_err(failed(pid, "listing its threads"))
    }

    fn trace(&self, thread: Pid) -> Result<Tracking, ProcessStopError> {
        let pid = self.pid;
        for _ in 0..TRIES {
            match ptrace::seize(thread) {
                Ok(()) => {
                    self.shared().push(thread);
                    // Fails if the thread is about to end, which is reported later.
                    let _ = ptrace::interrupt(thread);
                    return Ok(Tracking::Traced(ptrace::Thread::Runs));
                }
                Err(Errno::ESRCH) => return Ok(Tracking::Ended),
                // It has ended, is already traced, or may not be traced.
                Err(Errno::EPERM) => match status(pid, Some(thread)) {
                    Ok(status) if status.has_ended => return Ok(Tracking::Ended),
                    Ok(Status { tracer: 0, .. }) => {}
                    Ok(Status { tracer, .. }) => {
                        return Err(ProcessStopError::Traced { pid, tracer });
                    }
                    Err(ProcessStopError::Gone { .. }) => return Ok(Tracking::Ended),
                    Err(error) => return Err(error),
                },
                Err(errno) => return Err(failed(pid, "PTRACE_SEIZE")(errno.into())),
            }
        }
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
        let yama = scope.and_then(|scope| scope.trim().parse().ok());
        Err(ProcessStopError::NotPermitted { pid, yama })
    }

    /// Waits until no traced thread runs. Returns the number of stopped threads, and whether a
    /// thread is no longer traced.
    fn wait_for_all(&mut self) -> Result<(usize, bool), ProcessStopError> {
        let mut pause = FIRST_POLL;
        let mut lost_some = false;
        loop {
            let (mut stopped, mut running) = (0, None);
            for thread in self.traced() {
                let state = self.poll(thread)?;
                match state {
                    Some(ptrace::Thread::Runs) => running = Some(thread),
                    Some(ptrace::Thread::Stopped { .. }) => stopped += 1,
                    Some(ptrace::Thread::Ended) | None => {}
                }
                lost_some |= state.is_none();
                match state {
                    Some(state) => self.known.insert(thread, Tracking::Traced(state)),
                    None => self.known.remove(&thread),
                };
                // The thread may have executed another program while it was being traced, and be
                // the first thread now. It was not interrupted under that id. (ptrace accepts this
                // call from the tracer only, so no thread of another process is affected.)
                if state.is_none() && ptrace::interrupt(self.first).is_ok() {
                    let first = Tracking::Traced(ptrace::Thread::Runs);
                    self.known.insert(self.first, first);
                }
            }
            match running {
                None => return Ok((stopped, lost_some)),
                Some(thread) if self.deadline <= Instant::now() => {
                    return Err(self.unresponsive(thread));
                }
                Some(_) => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(5));
                }
            }
        }
    }

    fn unresponsive(&self, thread: Pid) -> ProcessStopError {
        ProcessStopError::Unresponsive {
            pid: self.pid,
            thread: thread.as_raw().cast_unsigned(),
            within: self.within,
            reason: reason(self.pid, thread),
        }
    }

    fn traced(&self) -> Vec<Pid> {
        let traced = |(thread, known): (&Pid, &Tracking)| {
            matches!(known, Tracking::Traced(_)).then_some(*thread)
        };
        self.known.iter().filter_map(traced).collect()
    }

    /// Returns the state of a thread, or `None` if it is no longer traced.
    fn poll(&self, thread: Pid) -> Result<Option<ptrace::Thread>, ProcessStopError> {
        match ptrace::state(thread) {
            // A thread that executes another program waits until all others are reaped, and takes
            // over the id of the first.
            Ok(ptrace::Thread::Ended) if thread != self.first => {
                self.shared()
                    .retain(|other| *other != thread || !ptrace::reap_exited(thread));
                Ok(None)
            }
            // The end of the first thread is not reported before the others have ended. If the
            // process is a child of this process, a thread that takes its place cannot be
            // distinguished from it.
            Ok(ptrace::Thread::Runs) if thread == self.first => Ok(match status(self.pid, None) {
                Ok(status) if status.has_ended => Some(ptrace::Thread::Ended),
                Ok(Status { tracer: 0, .. }) => None,
                _ => Some(ptrace::Thread::Runs),
            }),
            Ok(state) => Ok(Some(state)),
            Err(Errno::ECHILD) => {
                self.shared().retain(|other| *other != thread);
                Ok(None)
            }
            Err(errno) => Err(failed(self.pid, "waitid")(errno.into())),
        }
    }

    /// Detaches all stopped threads.
    ///
    /// The kernel detaches the remaining ones, which are not stopped or were killed, when this
    /// thread ends.
    pub(super) fn detach_all(&self) {
        for (thread, known) in &self.known {
            if let Tracking::Traced(ptrace::Thread::Stopped { signal }) = known {
                let _ = ptrace::detach(*thread, *signal);
            }
        }
    }
}

/// The state of a thread according to `/proc`.
pub(super) struct Status {
    /// The id of its process.
    pub(super) group: u32,
    has_ended: bool,
    /// It sleeps without reacting to signals.
    is_uninterruptible: bool,
    /// The id of its tracer, or 0.
    tracer: u32,
    /// The number of threads of its process, including those that have ended and were not reaped.
    threads: usize,
}

/// Returns the state of a process, or of one of its threads.
pub(super) fn status(pid: u32, thread: Option<Pid>) -> Result<Status, ProcessStopError> {
    let path = match thread {
        None => format!("/proc/{pid}/status"),
        Some(thread) => format!("/proc/{pid}/task/{thread}/status"),
    };
    let text = fs::read(path).map_err(failed(pid, "reading its status"))?;
    // The process chooses its name, on the first line, but the name has no line feed.
    let text = String::from_utf8_lossy(&text);
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.map_or("", str::trim)
    };
    let number = |key| value(key).parse().unwrap_or(0);
    Ok(Status {
        group: number("Tgid:"),
        has_ended: value("State:").starts_with(['Z', 'X']),
        is_uninterruptible: value("State:").starts_with('D'),
        tracer: number("TracerPid:"),
        threads: number("Threads:") as usize,
    })
}

/// Returns the activity of a thread that does not stop.
pub(super) fn reason(pid: u32, thread: Pid) -> Unresponsive {
    if !status(pid, Some(thread)).is_ok_and(|status| status.is_uninterruptible) {
        return Unresponsive::Running;
    }
    let read = |name| fs::read_to_string(format!("/proc/{pid}/task/{thread}/{name}"));
    let call = read("syscall").unwrap_or_default();
    let mut call = call.split_whitespace();
    let number = call.next().and_then(|number| number.parse().ok());
    let flags = call.next().and_then(|flags| flags.strip_prefix("0x"));
    let flags = flags.and_then(|flags| libc::c_long::from_str_radix(flags, 16).ok());
    if number.is_some_and(|number| is_vfork(number, flags.unwrap_or(0))) {
        return Unresponsive::Vfork;
    }
    // "0" if the kernel does not report it.
    let function = read("wchan")
        .ok()
        .filter(|name| !matches!(&name[..], "" | "0"));
    Unresponsive::Uninterruptible { function }
}

/// Returns `true` if a call blocks only to wait for a child to execute a program.
fn is_vfork(call: libc::c_long, flags: libc::c_long) -> bool {
    #[cfg(target_arch = "x86_64")]
    if call == libc::SYS_vfork {
        return true;
    }
    let by_flag = call == libc::SYS_clone && flags & libc::c_long::from(libc::CLONE_VFORK) != 0;
    by_flag || call == libc::SYS_clone3
}

pub(super) fn failed(
    pid: u32,
    operation: &'static str,
) -> impl FnOnce(io::Error) -> ProcessStopError {
    move |source| {
        if is_not_found(&source) {
            ProcessStopError::Gone { pid }
        } else {
            ProcessStopError::System {
                pid,
                operation,
                source,
            }
        }
    }
}
