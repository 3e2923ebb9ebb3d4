//! Signals that end the process: SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGALRM.
//!
//! So do SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM and SIGPROF, which would end it without a word.
//!
//! As long as nothing is staged, a signal ends the process at once. While something is, the first
//! one cancels the work, whose staged file is removed on the way out; a second one ends the process
//! anyway, and what is staged is left for the next writer to find and remove. The exit code is 128
//! and the number of the first signal, as a shell has it. A signal that was ignored when the
//! process started, as SIGHUP is by `nohup`, stays ignored.
//!
//! While RAM that exists [holds a part](Interrupt::overwrite) of what is restored, a second signal
//! does not end the process either: no guest is to start with half of its RAM, and people press
//! Ctrl-C twice. It says that a third one does. That one says what it leaves, and the exit code is
//! that of a failure.
//!
//! The thread that handles signals writes nothing else, and this only if the terminal takes it at
//! once, so that it ends the process also where that takes no output. A process that was stopped
//! runs again when this one ends.
//!
//! Signals that suspend are [held back](NotSuspended) while another process is stopped.

use std::io::{self, PipeReader, PipeWriter};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use memory_writer::CancelToken;
#[cfg(target_os = "linux")]
use nix::sys::signal::SigmaskHow;
use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
    SIGXFSZ,
};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::{failure, print, sys};

const SIGNALS: [i32; 10] = [
    SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM, SIGPROF,
];

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

#[derive(Debug)]
struct State {
    work: Work,
    /// RAM that holds a part of what it is to hold.
    part: Option<Part>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    /// Whether a second signal has come.
    warned: bool,
}

/// Who is told of signals.
#[derive(Clone, Debug)]
pub struct Interrupt {
    state: Arc<Mutex<State>>,
    cancel: CancelToken,
    /// Closed when the work is cancelled.
    waiting: Arc<Mutex<Option<PipeWriter>>>,
}

impl Interrupt {
    /// Listens from now on, on a thread of its own.
    pub fn listen() -> io::Result<Self> {
        let interrupt = Self {
            state: Arc::new(Mutex::new(State {
                work: Work::Reading,
                part: None,
            })),
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
        let mut state = self.locked();
        if state.work == Work::Staged {
            state.work = Work::Cancelled;
            self.cancel.cancel();
            drop(locked(&self.waiting).take());
            return;
        }
        // With the lock held: nobody stages anything in between, and RAM that holds a part does so
        // still. Unless it does, nothing is said: a terminal that takes no output would keep this
        // process, and one that it has stopped.
        match &mut state.part {
            None => process::exit(exit_code().into()),
            Some(part) if !part.warned => {
                part.warned = true;
                print::complain_at_once(&format!(
                    "{:?} holds a part of the RAM and is being emptied: one more signal ends ramsnap \
                     and leaves that part in it",
                    part.path
                ));
            }
            Some(part) => {
                print::complain_at_once(&format!(
                    "error: {:?} holds a part of the RAM, as ramsnap was interrupted while it emptied it: \
                     start no guest with it, and restore again",
                    part.path
                ));
                process::exit(failure::FAILED.into());
            }
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// From now on the RAM at `path` holds a part of what it is to hold, until what is returned is
    /// dropped.
    pub fn overwrite(&self, path: &Path) -> Overwriting {
        self.locked().part = Some(Part {
            path: path.to_owned(),
            warned: false,
        });
        Overwriting(self.clone())
    }

    /// From now on there is something to clean up, until the process ends.
    pub fn hold(&self) -> CancelToken {
        let mut state = self.locked();
        if state.work == Work::Reading {
            state.work = Work::Staged;
        }
        self.cancel.clone()
    }

    /// Returns a pipe that hangs up once the work is cancelled, for one that waits in `poll`. One
    /// at a time.
    pub fn hangs_up(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        let state = self.locked();
        if state.work != Work::Cancelled {
            *locked(&self.waiting) = Some(writer);
        }
        Ok(reader)
    }

    /// Nothing is to be cleaned up any more.
    pub fn release(&self) {
        let mut state = self.locked();
        if state.work == Work::Staged {
            state.work = Work::Reading;
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}

/// See [`Interrupt::overwrite`].
#[derive(Debug)]
pub struct Overwriting(Interrupt);

impl Drop for Overwriting {
    fn drop(&mut self) {
        self.0.locked().part = None;
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
/// While this process has stopped another one, that would stand still for as long. A signal that
/// comes meanwhile suspends this process once this is dropped, unless it was continued before.
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
