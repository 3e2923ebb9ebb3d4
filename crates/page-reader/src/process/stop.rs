//! A process that stands still.

mod threads;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::sys::ptrace;
use threads::{Threads, failed, status};

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
        "thread {thread} of process {pid} didn't stop within {within:?}: {reason}; try again, or give it more time"
    )]
    Unresponsive {
        /// The process.
        pid: u32,
        /// The thread.
        thread: u32,
        /// The time it was given.
        within: Duration,
        /// What the thread was doing.
        reason: Unresponsive,
    },
    /// The function given to [`StoppedProcess::stop_unless`] returned true.
    #[error("process {pid} wasn't stopped: cancelled")]
    Cancelled {
        /// The process.
        pid: u32,
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

/// Why a thread does not stop: [`ProcessStopError::Unresponsive`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unresponsive {
    /// It waits for a child, made by `vfork` or `posix_spawn`, to run a program or to end.
    Vfork,
    /// It sleeps in the kernel, where only what it waits for wakes it up: storage, most likely.
    Uninterruptible {
        /// The function of the kernel that it sleeps in, where the kernel tells.
        function: Option<String>,
    },
    /// It runs, or waits for a processor; or threads come and go faster than they can be stopped.
    Running,
}

impl fmt::Display for Unresponsive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vfork => {
                f.write_str("it waits for a child that it made by vfork to run a program or to end")
            }
            Self::Uninterruptible {
                function: Some(function),
            } => write!(
                f,
                "it waits in the kernel ({function}), most likely for storage"
            ),
            Self::Uninterruptible { function: None } => {
                f.write_str("it waits in the kernel, most likely for storage")
            }
            Self::Running => f.write_str("it runs, or waits for a processor"),
        }
    }
}

/// The time of the first attempt. A process of many threads on a busy machine may need more.
const FIRST_ATTEMPT: Duration = Duration::from_millis(100);
/// No attempt keeps a process that doesn't stop longer than this.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(1);
/// How often it is asked whether to give up.
const ASK: Duration = Duration::from_millis(20);

/// A process that begins to run another program seems to be gone, or out of reach, for a moment: its first thread has ended, and
/// another takes its place.
const TRIES: u32 = 3;

/// What is given more time is given a day.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

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
    /// Stops process `pid`, which takes milliseconds, and gives up after `within`.
    ///
    /// A thread that waits in the kernel stops when it returns from there. The others do not stand still
    /// until then: after an attempt of 100 ms, or later of up to 1 s, the process runs for as long as the
    /// attempt took, and is tried again.
    ///
    /// # Errors
    /// The process has ended, may not be traced, is traced already, is this one, or one of its threads waits in the kernel for longer than
    /// `within`. The process runs on then.
    pub fn stop(pid: u32, within: Duration) -> Result<Self, ProcessStopError> {
        Self::stop_unless(pid, within, &|| false)
    }

    /// The same, given up once `cancelled` returns true. It is called before each attempt, and now and
    /// then between them.
    ///
    /// # Errors
    /// As for [`stop`](Self::stop), and [`ProcessStopError::Cancelled`]. The process runs on then.
    pub fn stop_unless(
        pid: u32,
        within: Duration,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Self, ProcessStopError> {
        let within = within.min(LONGEST);
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut attempt = FIRST_ATTEMPT;
        loop {
            if cancelled() {
                return Err(ProcessStopError::Cancelled { pid });
            }
            match Self::attempt(pid, attempt.min(left()), deadline) {
                Err(ProcessStopError::Unresponsive { .. }) if !left().is_zero() => {
                    let rest_ends = Instant::now() + attempt.min(left());
                    while Instant::now() < rest_ends && !cancelled() {
                        thread::sleep(ASK);
                    }
                    attempt = (attempt * 2).min(LONGEST_ATTEMPT);
                }
                Err(ProcessStopError::Unresponsive {
                    pid,
                    thread,
                    reason,
                    ..
                }) => {
                    return Err(ProcessStopError::Unresponsive {
                        pid,
                        thread,
                        within,
                        reason,
                    });
                }
                result => return result,
            }
        }
    }

    fn attempt(pid: u32, within: Duration, deadline: Instant) -> Result<Self, ProcessStopError> {
        for _ in 1..TRIES {
            match Self::try_to_stop(pid, within, deadline) {
                Err(ProcessStopError::Gone { .. }) => {
                    thread::sleep(Duration::from_millis(2));
                }
                result => return result,
            }
        }
        Self::try_to_stop(pid, within, deadline)
    }

    fn try_to_stop(
        pid: u32,
        within: Duration,
        deadline: Instant,
    ) -> Result<Self, ProcessStopError> {
        // Its own, where one of its threads was named.
        let pid = status(pid, None)?.group;
        if pid == process::id() {
            return Err(ProcessStopError::Itself { pid });
        }
        let (tracer, threads) = Tracer::start(pid, within, deadline)?;
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
    ///
    /// An attempt takes `within`; the kernel may keep the tracer for longer, up to `deadline` at most.
    fn start(
        pid: u32,
        within: Duration,
        deadline: Instant,
    ) -> Result<(Self, usize), ProcessStopError> {
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
        let latest = deadline.max(Instant::now() + within) + GRACE;
        loop {
            match reported.recv_timeout(Duration::from_millis(10)) {
                Ok(Ok(threads)) => return Ok((tracer, threads)),
                Ok(Err(error)) => {
                    tracer.end();
                    return Err(error);
                }
                // Asking to trace a thread waits while another of its process begins to run another program, which waits until those
                // that are traced are forgotten: the tracer, which waits, can't do that.
                Err(RecvTimeoutError::Timeout) if Instant::now() < latest => {
                    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    shared.retain(|thread| *thread == first || !ptrace::forget_ended(*thread));
                }
                // It ends once the kernel lets it.
                Err(RecvTimeoutError::Timeout) => {
                    return Err(ProcessStopError::Unresponsive {
                        pid,
                        thread: pid,
                        within,
                        reason: threads::reason(pid, Pid::from_raw(pid.cast_signed())),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the tracer reports before it ends")
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

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::without_yama(None, "run as its user, or with CAP_SYS_PTRACE")]
    #[case::off(Some(0), "run as its user, or with CAP_SYS_PTRACE")]
    #[case::ancestors(Some(1), "ptrace_scope is 1")]
    #[case::capability(Some(2), "ptrace_scope is 2")]
    #[case::never(Some(3), "until the machine starts anew")]
    fn who_may_not_trace_is_told_what_forbids_it(#[case] yama: Option<u32>, #[case] said: &str) {
        let error = ProcessStopError::NotPermitted { pid: 7, yama };
        assert!(error.to_string().contains(said), "{error}");
    }
}
