//! Signals that end the process: SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGALRM.
//!
//! As long as nothing is staged, a signal ends the process at once. While something is, the first one cancels the work, whose staged file
//! is removed on the way out; a second one ends the process anyway, and what is staged is left for the next writer to find and remove.
//! The exit code is 128 and the number of the first signal, as a shell has it. A signal that was ignored when the process started, as
//! SIGHUP is by `nohup`, stays ignored.
//!
//! The thread that handles signals writes nothing, so that it ends the process also where the terminal takes no output. A process that
//! was stopped runs again when this one ends.
//!
//! Signals that suspend are [held back](NotSuspended) while another process is stopped.

use std::io::{self, PipeReader, PipeWriter};
use std::process;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use memory_writer::CancelToken;
#[cfg(target_os = "linux")]
use nix::sys::signal::SigmaskHow;
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGALRM, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::sys;

const SIGNALS: [i32; 5] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM];

/// The first signal that came.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The exit code of a process that a signal ended: 128 and the signal's number.
pub fn exit_code() -> u8 {
    let signal = match SIGNAL.load(Ordering::Relaxed) {
        0 => SIGINT,
        signal => signal,
    };
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Nothing is to be cleaned up.
    Reading,
    Staged,
    Cancelled,
}

/// Who is told of signals.
#[derive(Clone, Debug)]
pub struct Interrupt {
    work: Arc<Mutex<Work>>,
    cancel: CancelToken,
    /// Closed when the work is cancelled.
    waiting: Arc<Mutex<Option<PipeWriter>>>,
}

impl Interrupt {
    /// Listens from now on, on a thread of its own.
    pub fn listen() -> io::Result<Self> {
        let interrupt = Self {
            work: Arc::new(Mutex::new(Work::Reading)),
            cancel: CancelToken::new(),
            waiting: Arc::default(),
        };
        // Otherwise deadly: writing past RLIMIT_FSIZE is to be the error EFBIG.
        flag::register(SIGXFSZ, Arc::default())?;
        let heeded = SIGNALS.iter().filter(|signal| !sys::is_ignored(**signal));
        let mut signals = Signals::new(heeded)?;
        let listener = interrupt.clone();
        thread::Builder::new().spawn(move || {
            // Left to the main thread, which may hold them back.
            let _ = suspending().thread_block();
            for signal in signals.forever() {
                listener.signalled(signal);
            }
        })?;
        Ok(interrupt)
    }

    fn signalled(&self, signal: i32) {
        let _ = SIGNAL.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
        let mut work = locked(&self.work);
        if *work == Work::Staged {
            *work = Work::Cancelled;
            self.cancel.cancel();
            drop(locked(&self.waiting).take());
            return;
        }
        // With the lock held: nobody stages anything in between. Nothing is said: a terminal that takes no
        // output would keep this process, and one that it has stopped.
        process::exit(exit_code().into());
    }

    /// From now on there is something to clean up, until the process ends.
    pub fn hold(&self) -> CancelToken {
        let mut work = locked(&self.work);
        if *work == Work::Reading {
            *work = Work::Staged;
        }
        self.cancel.clone()
    }

    /// Returns a pipe that hangs up once the work is cancelled, for one that waits in `poll`. One
    /// at a time.
    pub fn hangs_up(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        let work = locked(&self.work);
        if *work != Work::Cancelled {
            *locked(&self.waiting) = Some(writer);
        }
        Ok(reader)
    }

    /// Nothing is to be cleaned up any more.
    pub fn release(&self) {
        let mut work = locked(&self.work);
        if *work == Work::Staged {
            *work = Work::Reading;
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

/// Nothing that is done under these locks can panic half-way.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Signals by which a terminal suspends a process. SIGSTOP can't be held back.
fn suspending() -> SigSet {
    SigSet::from_iter([Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU])
}

/// Holds back the signals that suspend this process, in this thread and those that it starts.
///
/// While this process has stopped another one, that would stand still for as long. A signal that comes
/// meanwhile suspends this process once this is dropped, unless it was continued before.
#[cfg(target_os = "linux")]
#[derive(Debug)]
pub struct NotSuspended {
    before: SigSet,
}

#[cfg(target_os = "linux")]
impl NotSuspended {
    pub fn from_now_on() -> io::Result<Self> {
        let before = suspending().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self { before })
    }
}

#[cfg(target_os = "linux")]
impl Drop for NotSuspended {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}
