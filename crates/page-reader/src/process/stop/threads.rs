//! The threads of a process, all of them stopped: the part of it that runs on the thread that traces.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

use super::{ProcessStopError, TRIES, Unresponsive};
use crate::process::is_not_there;
use crate::sys::ptrace;

/// Until it is looked again, at first.
const SOON: Duration = Duration::from_micros(20);

/// The threads of a process, as the thread that traces them knows them.
pub(super) struct Threads {
    pid: u32,
    /// Its id is the process's.
    pub(super) first: Pid,
    within: Duration,
    deadline: Instant,
    known: BTreeMap<Pid, Known>,
    /// All that were ever traced, and are not forgotten. Locked while one is.
    pub(super) shared: Arc<Mutex<Vec<Pid>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Traced(ptrace::Thread),
    /// Ended before it could be traced. Its id may be a new thread's next.
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

    /// Stops all of them, and says how many that are.
    ///
    /// Threads that run make new ones meanwhile. When a list is taken while all that are known stand still, with all in it that the kernel counts, and
    /// nothing in it is new or about to vanish, there's none left that could.
    pub(super) fn stop(&mut self) -> Result<usize, ProcessStopError> {
        loop {
            let in_flux = self.trace_all()?;
            let (stopped, lost_some) = self.wait_for_all()?;
            match (stopped, in_flux || lost_some) {
                (_, true) if self.deadline <= Instant::now() => {
                    return Err(self.unresponsive(self.first));
                }
                (_, true) => thread::sleep(SOON),
                (0, false) => return Err(ProcessStopError::Gone { pid: self.pid }),
                (stopped, false) => return Ok(stopped),
            }
        }
    }

    /// Whether there may be others: where there was a new one, or one that ends, or fewer than there are. The kernel's list breaks off at a thread that
    /// vanishes while it is taken, whatever comes after, and may have that thread or not. (Only the first stays for as long as there are others.)
    fn trace_all(&mut self) -> Result<bool, ProcessStopError> {
        let list = self.list()?;
        let mut in_flux = status(self.pid, None)?.threads != list.len();
        for thread in list {
            let known = self.known.get(&thread).copied();
            if matches!(known, Some(Known::Traced(_))) {
                continue;
            }
            let now = self.trace(thread)?;
            in_flux |= known != Some(now) || (now == Known::Ended && thread != self.first);
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

    fn trace(&self, thread: Pid) -> Result<Known, ProcessStopError> {
        let pid = self.pid;
        for _ in 0..TRIES {
            match ptrace::seize(thread) {
                Ok(()) => {
                    self.shared().push(thread);
                    // Fails where it's about to end, which is told then.
                    let _ = ptrace::interrupt(thread);
                    return Ok(Known::Traced(ptrace::Thread::Runs));
                }
                Err(Errno::ESRCH) => return Ok(Known::Ended),
                // It has ended, is traced already, or may not be.
                Err(Errno::EPERM) => match status(pid, Some(thread)) {
                    Ok(status) if status.has_ended => return Ok(Known::Ended),
                    Ok(Status { tracer: 0, .. }) => {}
                    Ok(Status { tracer, .. }) => {
                        return Err(ProcessStopError::Traced { pid, tracer });
                    }
                    Err(ProcessStopError::Gone { .. }) => return Ok(Known::Ended),
                    Err(error) => return Err(error),
                },
                Err(errno) => return Err(failed(pid, "PTRACE_SEIZE")(errno.into())),
            }
        }
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
        let yama = scope.and_then(|scope| scope.trim().parse().ok());
        Err(ProcessStopError::NotPermitted { pid, yama })
    }

    /// How many stand still, and whether one isn't traced any more.
    fn wait_for_all(&mut self) -> Result<(usize, bool), ProcessStopError> {
        let mut pause = SOON;
        let mut lost_some = false;
        loop {
            let (mut stopped, mut running) = (0, None);
            for thread in self.traced() {
                let state = self.look_at(thread)?;
                match state {
                    Some(ptrace::Thread::Runs) => running = Some(thread),
                    Some(ptrace::Thread::Stopped { .. }) => stopped += 1,
                    Some(ptrace::Thread::Ended) | None => {}
                }
                lost_some |= state.is_none();
                match state {
                    Some(state) => self.known.insert(thread, Known::Traced(state)),
                    None => self.known.remove(&thread),
                };
                // It may be the first by now, having run another program while it was about to be traced: by that id nobody asked it to
                // stop. (No other process's thread can be: ptrace takes this from its tracer alone.)
                if state.is_none() && ptrace::interrupt(self.first).is_ok() {
                    let first = Known::Traced(ptrace::Thread::Runs);
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
        let traced =
            |(thread, known): (&Pid, &Known)| matches!(known, Known::Traced(_)).then_some(*thread);
        self.known.iter().filter_map(traced).collect()
    }

    /// `None` where it isn't traced any more.
    fn look_at(&self, thread: Pid) -> Result<Option<ptrace::Thread>, ProcessStopError> {
        match ptrace::state(thread) {
            // A thread that runs another program waits until all others are forgotten, and takes on the id of the first.
            Ok(ptrace::Thread::Ended) if thread != self.first => {
                self.shared()
                    .retain(|other| *other != thread || !ptrace::forget_ended(thread));
                Ok(None)
            }
            // The end of the first isn't told before the others ended; and where the process is a child of this one, another that takes
            // its place isn't told from it.
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

    /// Those that aren't stopped, or can't be let go for they were killed, the kernel lets go when this thread ends.
    pub(super) fn let_go(&self) {
        for (thread, known) in &self.known {
            if let Known::Traced(ptrace::Thread::Stopped { signal }) = known {
                let _ = ptrace::detach(*thread, *signal);
            }
        }
    }
}

/// What `/proc` says of a thread.
pub(super) struct Status {
    /// The process it is of.
    pub(super) group: u32,
    has_ended: bool,
    /// It sleeps where no signal wakes it up.
    is_uninterruptible: bool,
    /// 0 for none.
    tracer: u32,
    /// That its process has, those included that have ended and were not waited for.
    threads: usize,
}

/// Of a process, or of one of its threads.
pub(super) fn status(pid: u32, thread: Option<Pid>) -> Result<Status, ProcessStopError> {
    let path = match thread {
        None => format!("/proc/{pid}/status"),
        Some(thread) => format!("/proc/{pid}/task/{thread}/status"),
    };
    let text = fs::read(path).map_err(failed(pid, "reading its status"))?;
    // The name, on the first line, is whatever the process likes, but has no line feed.
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

/// What a thread that does not stop is doing.
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
    if number.is_some_and(|number| makes_a_child(number, flags.unwrap_or(0))) {
        return Unresponsive::Vfork;
    }
    // "0" where the kernel doesn't tell.
    let function = read("wchan")
        .ok()
        .filter(|name| !matches!(&name[..], "" | "0"));
    Unresponsive::Uninterruptible { function }
}

/// Whether it's a call that waits for a child to run a program: the only wait of such a call.
fn makes_a_child(call: libc::c_long, flags: libc::c_long) -> bool {
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
        if is_not_there(&source) {
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
