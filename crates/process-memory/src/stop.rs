//! Stops another process with ptrace.

mod error;
mod threads;

use std::convert::Infallible;
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use host_memory::BlockedSignals;
use nix::unistd::Pid;
use sparse_file::CancelToken;

pub use error::{ProcessStopError, Unresponsive};

use crate::sys::ptrace;
use threads::{TRIES, Threads, failed, status};

/// Another process, all of whose threads are stopped while this value exists.
///
/// On drop, the process resumes where it stopped. If this process is killed, the kernel resumes it.
/// Signals that were sent to the stopped process are delivered then, and a process that was stopped
/// before (`SIGSTOP`) stays stopped. Only `SIGKILL` ends a stopped process. Reads of its memory
/// then fail with [`Gone`](crate::ProcessMemoryError::Gone). Its process id is not reused before
/// the drop, so stop the process first, then open its memory.
///
/// Ptrace stops the threads. The memory stops changing as well, unless other writers exist: a
/// process that shares the memory, requests in the kernel (io_uring, vhost), a device. If there are
/// such writers, pause the guest in its VMM. For the process, the effect is that of `SIGSTOP` and
/// `SIGCONT`: a few blocking system calls fail with `EINTR`, `KVM_RUN` among them, as for any
/// signal.
///
/// Stopping requires permission to trace the process: the same user and no Yama restriction, or
/// `CAP_SYS_PTRACE`. A process has one tracer at a time, so a debugger cannot attach. Do not wait
/// for a stopped child of this process, because the wait would report the stop.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use page_reader::PageReader;
/// use process_memory::{ProcessMaps, ProcessMemory, StoppedProcess};
///
/// fn top_of_stack(pid: u32) -> Result<[u8; 8], Box<dyn std::error::Error>> {
///     let stopped = StoppedProcess::stop(pid, Duration::from_secs(5))?;
///     let maps = ProcessMaps::of(pid)?;
///     let stack = maps.named("[stack]")?;
///     let memory = ProcessMemory::open(pid, [(stack.addresses.start, stack.size())])?;
///     let mut top = [1; 8];
///     memory.read_at(stack.size() - 8, &mut top)?;
///     drop(stopped); // resumes the process
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
#[must_use = "the process resumes when this is dropped"]
pub struct StoppedProcess {
    pid: u32,
    threads: usize,
    tracer: Tracer,
}

/// The time limit of the first attempt. A process of many threads on a busy machine may need more.
const FIRST_ATTEMPT: Duration = Duration::from_millis(100);
/// The longest time for which an unsuccessful attempt stops the process.
const MAX_ATTEMPT: Duration = Duration::from_secs(1);
/// The interval at which the token is checked between attempts.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// Longer timeouts are reduced to one day.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

impl StoppedProcess {
    /// Stops process `pid`, which takes milliseconds, or gives up after `within`.
    ///
    /// A thread that waits in the kernel stops when it returns from there. The other threads are
    /// not stopped for that long: an attempt is limited to 100 ms, later attempts to up to 1 s.
    /// After a failed attempt, the process runs for as long as the attempt took.
    ///
    /// # Errors
    /// Returns an error if the process has ended, may not be traced, is already traced, is the
    /// calling process, or if one of its threads waits in the kernel for longer than `within`. The
    /// process keeps running.
    pub fn stop(pid: u32, within: Duration) -> Result<Self, ProcessStopError> {
        Self::stop_unless(pid, within, &CancelToken::new())
    }

    /// Stops process `pid` like [`stop`](Self::stop), or gives up once `cancel` is cancelled. The
    /// token is checked before each attempt, and regularly between attempts.
    ///
    /// # Errors
    /// Returns the errors of [`stop`](Self::stop), and [`ProcessStopError::Cancelled`]. The process
    /// keeps running.
    pub fn stop_unless(
        pid: u32,
        within: Duration,
        cancel: &CancelToken,
    ) -> Result<Self, ProcessStopError> {
        let within = within.min(MAX_TIMEOUT);
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut attempt = FIRST_ATTEMPT;
        loop {
            if cancel.is_cancelled() {
                return Err(ProcessStopError::Cancelled { pid });
            }
            match Self::attempt(pid, attempt.min(left()), deadline) {
                Err(ProcessStopError::Unresponsive { .. }) if !left().is_zero() => {
                    let rest_ends = Instant::now() + attempt.min(left());
                    while Instant::now() < rest_ends && !cancel.is_cancelled() {
                        thread::sleep(CANCEL_INTERVAL);
                    }
                    attempt = (attempt * 2).min(MAX_ATTEMPT);
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
        // The id of the process, if `pid` is that of one of its other threads.
        let pid = status(pid, None)?.group;
        if pid == process::id() {
            return Err(ProcessStopError::CurrentProcess { pid });
        }
        let (tracer, threads) = Tracer::start(pid, within, deadline)?;
        Ok(Self {
            pid,
            threads,
            tracer,
        })
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the number of stopped threads.
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

/// The thread that traces. ptrace accepts requests from this thread only, and the kernel detaches
/// all traced threads when it ends.
#[derive(Debug)]
struct Tracer {
    /// Dropped to end the thread.
    guard: Option<mpsc::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

/// The delay after the deadline that a tracer may take to report.
const GRACE: Duration = Duration::from_secs(1);

impl Tracer {
    /// Starts a tracer, and returns it with the number of stopped threads.
    ///
    /// An attempt takes `within`. The kernel may block the tracer for longer, at most until
    /// `deadline`.
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
            // Returns an error when the guard is dropped; there are no messages.
            let _ = guarded.recv();
            threads.detach_all();
        };
        // A handler may wait for the stopped process, which the tracer is to resume.
        let blocked = BlockedSignals::new();
        let thread = thread::Builder::new().name("tracer".into()).spawn(trace);
        drop(blocked);
        let thread = thread.map_err(failed(pid, "starting a thread"))?;
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
                // PTRACE_SEIZE blocks while another thread of the process executes a program. That
                // thread waits until the traced threads are reaped, which the blocked tracer cannot
                // do.
                Err(RecvTimeoutError::Timeout) if Instant::now() < latest => {
                    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    shared.retain(|thread| *thread == first || !ptrace::reap_exited(*thread));
                }
                // The tracer ends when the kernel unblocks it.
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
