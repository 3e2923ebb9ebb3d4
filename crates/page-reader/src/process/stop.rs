//! A process that stands still.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::is_not_there;
use crate::sys::ptrace;

/// Another process, all threads of which are stopped for as long as this value lives.
///
/// Dropped, the process goes on where it stood; so it does, by the kernel's care, when this process is killed. Signals sent
/// to it meanwhile arrive then, and one that was stopped already (`SIGSTOP`) stays stopped. Nothing ends it but `SIGKILL`:
/// reads of its memory tell then that it's [gone](crate::ProcessMemoryError::Gone). Its id isn't given to another process meanwhile: stop
/// first, then look for its memory and read it.
///
/// What stands still are the threads, by ptrace. Their memory does too, unless somebody else writes it: a process that shares it, the kernel
/// for requests on their way (io_uring, vhost), a device. Pause the guest in its monitor where there are such. To the process it's as if it were
/// stopped by `SIGSTOP` and continued: a few system calls that wait fail with `EINTR`, `KVM_RUN` among them, as for any signal.
///
/// Stopping needs the right to trace the process: the same user and no Yama restriction, or `CAP_SYS_PTRACE`. A process has one tracer at
/// a time, so no debugger can look into it meanwhile. Where it's a child of this process, don't wait for it meanwhile: that would
/// be told of the stop.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use page_reader::{PageReader, ProcessMaps, ProcessMemory, StoppedProcess};
///
/// fn top_of_stack(pid: u32) -> Result<[u8; 8], Box<dyn std::error::Error>> {
///     let stopped = StoppedProcess::stop(pid, Duration::from_secs(5))?;
///     let maps = ProcessMaps::of(pid)?;
///     let stack = maps.named("[stack]")?;
///     let memory = ProcessMemory::open(pid, [(stack.addresses.start, stack.size())])?;
///     let mut top = [1; 8];
///     memory.read_at(stack.size() - 8, &mut top)?;
///     drop(stopped); // goes on
///     Ok(top)
/// }
/// # let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
/// # let top = top_of_stack(child.id());
/// # child.kill()?;
/// # child.wait()?;
/// # match top {
/// #     Err(error) if error.to_string().contains("may not trace") => {}
/// #     top => assert_eq!(top.unwrap(), [0; 8]),
/// # }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "the process goes on when this is dropped"]
pub struct StoppedProcess {
    pid: u32,
    threads: usize,
    tracer: Tracer,
}

/// Why a process wasn't stopped. It runs on, all threads of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessStopError {
    /// There's no such process, or it has ended.
    #[error("process {pid} isn't there, or has ended")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// It's the process that asked.
    #[error("process {pid} is this one, which can't stop itself and go on: give the monitor's id")]
    Itself {
        /// The process.
        pid: u32,
    },
    /// Another process traces it, and there's one tracer at a time.
    #[error(
        "process {pid} is traced already, by process or thread {tracer} (a debugger, strace, another capture): end that first"
    )]
    Traced {
        /// The process.
        pid: u32,
        /// The thread that traces it, 0 where that is outside of this process's PID namespace.
        tracer: u32,
    },
    /// This process has no right to trace it.
    #[error("this process may not trace process {pid}: {}", remedy(*yama))]
    NotPermitted {
        /// The process.
        pid: u32,
        /// What `kernel.yama.ptrace_scope` is, where there is such a thing: from 1 on it restricts tracing.
        yama: Option<u32>,
    },
    /// A thread didn't stop in the time given.
    #[error(
        "thread {thread} of process {pid} didn't stop within {within:?}: it waits in the kernel, most likely for storage \
         or for a new child to run a program (see /proc/{pid}/task/{thread}/wchan); try again, or give it more time"
    )]
    Unresponsive {
        /// The process.
        pid: u32,
        /// The thread.
        thread: u32,
        /// The time it was given.
        within: Duration,
    },
    /// A call failed for a reason of its own.
    #[error("stopping process {pid}: {operation} failed")]
    System {
        /// The process.
        pid: u32,
        /// The call.
        operation: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// A process that begins to run another program seems to be gone, or out of reach, for a moment: its first thread has ended, and
/// another takes its place.
const TRIES: u32 = 3;

fn remedy(yama: Option<u32>) -> &'static str {
    match yama {
        None | Some(0) => "run as its user, or with CAP_SYS_PTRACE (as root)",
        Some(1) => {
            "Yama (kernel.yama.ptrace_scope is 1) lets only its ancestors: run with CAP_SYS_PTRACE (as root)"
        }
        Some(2) => "Yama (kernel.yama.ptrace_scope is 2) demands CAP_SYS_PTRACE: run as root",
        Some(_) => {
            "Yama forbids all tracing (kernel.yama.ptrace_scope is 3) until the machine starts anew with another setting"
        }
    }
}

impl StoppedProcess {
    /// Stops process `pid`, which takes a millisecond or so, and gives up after `within`.
    ///
    /// # Errors
    /// The process has ended, may not be traced, is traced already, is this one, or one of its threads waits in the kernel for longer than
    /// `within`. The process runs on then.
    pub fn stop(pid: u32, within: Duration) -> Result<Self, ProcessStopError> {
        for _ in 1..TRIES {
            match Self::try_to_stop(pid, within) {
                Err(ProcessStopError::Gone { .. }) => {
                    thread::sleep(Duration::from_millis(2));
                }
                result => return result,
            }
        }
        Self::try_to_stop(pid, within)
    }

    fn try_to_stop(pid: u32, within: Duration) -> Result<Self, ProcessStopError> {
        if status(pid, None)?.group == process::id() {
            return Err(ProcessStopError::Itself { pid });
        }
        let (tracer, threads) = Tracer::start(pid, within)?;
        Ok(Self {
            pid,
            threads,
            tracer,
        })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How many threads of it were stopped.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.tracer.end();
    }
}

/// The thread that traces. ptrace takes requests from no other, and the kernel lets go of all it traced when it ends.
#[derive(Debug)]
struct Tracer {
    /// Dropped to have it end.
    guard: Option<mpsc::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

/// How much later than it should a tracer may report.
const GRACE: Duration = Duration::from_secs(1);

impl Tracer {
    /// Also how many threads were stopped.
    fn start(pid: u32, within: Duration) -> Result<(Self, usize), ProcessStopError> {
        let (guard, guarded) = mpsc::channel();
        let (report, reported) = mpsc::channel();
        let mut threads = Threads::of(pid, within);
        let (first, shared) = (threads.first, Arc::clone(&threads.shared));
        let trace = move || {
            let _ = report.send(threads.stop());
            // An error once the guard is dropped, as no message can be.
            let _ = guarded.recv();
            threads.let_go();
        };
        let thread = thread::Builder::new()
            .name("tracer".into())
            .spawn(trace)
            .map_err(failed(pid, "starting a thread"))?;
        let mut tracer = Self {
            guard: Some(guard),
            thread: Some(thread),
        };
        let latest = Instant::now() + within + GRACE;
        loop {
            match reported.recv_timeout(Duration::from_millis(10)) {
                Ok(Ok(threads)) => return Ok((tracer, threads)),
                Ok(Err(error)) => {
                    tracer.end();
                    return Err(error);
                }
                // Asking to trace a thread waits while another of its process begins to run another program, which waits until those
                // that are traced are forgotten: the tracer, which waits, can't do that.
                Err(_) if Instant::now() < latest => {
                    let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    for thread in shared.iter().filter(|thread| **thread != first) {
                        let _ = ptrace::forget_ended(*thread);
                    }
                }
                // It ends once the kernel lets it.
                Err(_) => {
                    return Err(ProcessStopError::Unresponsive {
                        pid,
                        thread: pid,
                        within,
                    });
                }
            }
        }
    }

    fn end(&mut self) {
        drop(self.guard.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The threads of a process, as the thread that traces them knows them.
struct Threads {
    pid: u32,
    /// Its id is the process's.
    first: Pid,
    within: Duration,
    deadline: Instant,
    known: BTreeMap<Pid, Known>,
    /// All that were ever traced.
    shared: Arc<Mutex<Vec<Pid>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Traced(ptrace::Thread),
    /// Ended before it could be traced. Its id may be a new thread's next.
    Ended,
}

impl Threads {
    fn of(pid: u32, within: Duration) -> Self {
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
    /// Threads that run make new ones meanwhile. When a list is taken while all that are known stand still and nothing in it is new, there's none
    /// left that could.
    fn stop(&mut self) -> Result<usize, ProcessStopError> {
        loop {
            let found_new = self.trace_all()?;
            let (stopped, lost_some) = self.wait_for_all()?;
            match (stopped, found_new || lost_some) {
                (_, true) if self.deadline <= Instant::now() => {
                    return Err(self.unresponsive(self.first));
                }
                (_, true) => {}
                (0, false) => return Err(ProcessStopError::Gone { pid: self.pid }),
                (stopped, false) => return Ok(stopped),
            }
        }
    }

    /// Whether there was a new one.
    fn trace_all(&mut self) -> Result<bool, ProcessStopError> {
        let mut found_new = false;
        for thread in self.list()? {
            let known = self.known.get(&thread).copied();
            if matches!(known, Some(Known::Traced(_))) {
                continue;
            }
            let now = self.trace(thread)?;
            found_new |= known != Some(now);
            self.known.insert(thread, now);
        }
        Ok(found_new)
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
        let mut pause = Duration::from_micros(20);
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
                let _ = ptrace::forget_ended(thread);
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
            Err(Errno::ECHILD) => Ok(None),
            Err(errno) => Err(failed(self.pid, "waitid")(errno.into())),
        }
    }

    /// Those that aren't stopped, or can't be let go for they were killed, the kernel lets go when this thread ends.
    fn let_go(&self) {
        for (thread, known) in &self.known {
            if let Known::Traced(ptrace::Thread::Stopped { signal }) = known {
                let _ = ptrace::detach(*thread, *signal);
            }
        }
    }
}

/// What `/proc` says of a thread.
struct Status {
    /// The process it is of.
    group: u32,
    has_ended: bool,
    /// 0 for none.
    tracer: u32,
}

/// Of a process, or of one of its threads.
fn status(pid: u32, thread: Option<Pid>) -> Result<Status, ProcessStopError> {
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
        tracer: number("TracerPid:"),
    })
}

fn failed(pid: u32, operation: &'static str) -> impl FnOnce(io::Error) -> ProcessStopError {
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
