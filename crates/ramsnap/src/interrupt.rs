//! Signals that end the process: SIGINT, SIGTERM, SIGHUP, SIGQUIT and SIGALRM.
//!
//! SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM and SIGPROF are handled too: by default, they would end the
//! process without a message.
//!
//! If nothing is staged, a signal ends the process at once. If a file is staged, the first signal
//! cancels the work, and the staged file is removed before the process exits. A second signal ends
//! the process at once, and the next writer finds and removes the staged file. The exit code is 128
//! plus the number of the first signal, as in a shell. A signal that was ignored when the
//! process started, as SIGHUP is by `nohup`, stays ignored.
//!
//! In a [critical section](Critical) a second signal does not end the process either: a guest must
//! not start with half of its RAM, and users press Ctrl-C twice. The second signal prints that a
//! third one ends the process. The third signal prints what is left, and the exit code is that of a
//! failure. Once the result is in place, any signal after the first prints that, and ends the
//! process.
//!
//! The thread that handles signals prints nothing else, and prints these messages only if the
//! terminal accepts them at once. It therefore ends the process even if the terminal takes no
//! output. A process that was stopped runs again when this one ends.
//!
//! Signals that suspend are [held back](NotSuspended) while another process is stopped.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use memory_writer::CancelToken;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
    SIGXFSZ,
};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::exit_status::ExitStatus;
use crate::{stderr, sys};

const SIGNALS: [i32; 10] = [
    SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGALRM, SIGUSR1, SIGUSR2, SIGXCPU, SIGVTALRM, SIGPROF,
];

/// The first signal that came.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Returns the exit status of a process that a signal ended.
pub fn exit_status() -> ExitStatus {
    ExitStatus::Interrupted(match SIGNAL.load(Ordering::Relaxed) {
        0 => SIGINT,
        signal => signal,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// No file is staged.
    Reading,
    Staged,
    Cancelled,
}

#[derive(Debug)]
struct State {
    work: Work,
    /// The file that is being changed.
    changed: Option<Changed>,
}

/// A file that is overwritten or replaced.
#[derive(Debug)]
struct Changed {
    path: PathBuf,
    stage: Stage,
    /// Whether a second signal has come.
    warned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Existing RAM is overwritten, or emptied.
    Part,
    /// All of the RAM is written, but it may not be on its disk.
    Whole,
    /// A staged file is put in place.
    Commit,
    /// The result is in place, and on its disk.
    Done,
}

impl Changed {
    /// Returns the message for the second signal, or `None` if that ends the process.
    fn warning(&self) -> Option<String> {
        let path = &self.path;
        match self.stage {
            Stage::Part => Some(format!(
                "{path:?} holds a part of the RAM and is being emptied: one more signal ends ramsnap \
                 and leaves that part in it"
            )),
            Stage::Whole => Some(format!(
                "{path:?} holds all of the RAM, which is being brought to its disk: one more signal \
                 ends ramsnap before that is done"
            )),
            Stage::Commit => Some(format!(
                "{path:?} is being put in place: one more signal ends ramsnap before that is done"
            )),
            Stage::Done => None,
        }
    }

    /// Returns the message of a signal that ends the process.
    fn remains(&self) -> String {
        let path = &self.path;
        match self.stage {
            Stage::Part => format!(
                "error: {path:?} holds a part of the RAM, as ramsnap was interrupted while it emptied \
                 it: start no guest with it, and restore again"
            ),
            Stage::Whole => format!(
                "error: {path:?} holds all of the RAM, but ramsnap was interrupted while it brought it \
                 to its disk: run `sync`, as a power failure may damage it until then, or restore again"
            ),
            Stage::Commit => format!(
                "error: ramsnap was interrupted while it put {path:?} in place: the old file is there \
                 whole, or the new one; look at it with `ramsnap info`, and run this again if it is \
                 the old one"
            ),
            Stage::Done => format!(
                "error: {path:?} is in place, and ramsnap was interrupted before it reported that"
            ),
        }
    }

    /// Returns the exit status for a signal that ends the process.
    fn exit_status(&self) -> ExitStatus {
        match self.stage {
            Stage::Part | Stage::Whole | Stage::Commit => ExitStatus::Failed,
            Stage::Done => exit_status(),
        }
    }
}

/// The signal handler, and the state that decides what a signal does.
#[derive(Clone, Debug)]
pub struct Interrupt {
    state: Arc<Mutex<State>>,
    cancel: CancelToken,
    /// Closed when the work is cancelled.
    waiting: Arc<Mutex<Option<PipeWriter>>>,
    /// Gets a byte for each signal, which then does nothing else.
    forwarded: Arc<Mutex<Option<PipeWriter>>>,
}

impl Interrupt {
    /// Starts a thread that handles signals.
    pub fn listen() -> io::Result<Self> {
        let interrupt = Self {
            state: Arc::new(Mutex::new(State {
                work: Work::Reading,
                changed: None,
            })),
            cancel: CancelToken::new(),
            waiting: Arc::default(),
            forwarded: Arc::default(),
        };
        // SIGXFSZ would end the process. Writing past RLIMIT_FSIZE then fails with EFBIG.
        flag::register(SIGXFSZ, Arc::default())?;
        let heeded = SIGNALS.iter().filter(|signal| !sys::is_ignored(**signal));
        let mut signals = Signals::new(heeded)?;
        let listener = interrupt.clone();
        // The main thread handles these, and may hold them back. The listener inherits the block:
        // one of its own would come too late for a signal that is sent while it starts.
        let before = suspending().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let started = thread::Builder::new().spawn(move || {
            for signal in signals.forever() {
                listener.signalled(signal);
            }
        });
        before.thread_set_mask()?;
        started?;
        Ok(interrupt)
    }

    fn signalled(&self, signal: i32) {
        let _ = SIGNAL.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
        if let Some(forwarded) = &mut *locked(&self.forwarded) {
            // The reader lives as long as the verb.
            let _ = forwarded.write(&[0]);
            return;
        }
        let mut state = self.locked();
        if state.work == Work::Staged {
            state.work = Work::Cancelled;
            self.cancel.cancel();
            drop(locked(&self.waiting).take());
            return;
        }
        // The lock is held, so no thread stages a file or leaves a critical section in between. A
        // message is waited for only in a critical section: a terminal that takes no output would
        // block this process, and a process that it has stopped.
        let Some(changed) = &mut state.changed else {
            if state.work == Work::Cancelled {
                stderr::line_if_ready(
                    "error: ramsnap was interrupted again before it had cleaned up: a staged file may \
                     be left beside the output, which `ramsnap sweep DIR` removes, and existing RAM \
                     may be empty: restore it again",
                );
            }
            process::exit(exit_status().code().into())
        };
        match changed.warning() {
            Some(warning) if !changed.warned => {
                changed.warned = true;
                stderr::line_at_once(&warning);
            }
            _ => {
                stderr::line_at_once(&changed.remains());
                process::exit(changed.exit_status().code().into());
            }
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Records that the RAM at `path` is being overwritten, until the returned value is dropped.
    pub fn overwrite(&self, path: &Path) -> Critical {
        self.enter(path, Stage::Part)
    }

    /// Records that a staged file is being put in place at `path`, until the returned value is
    /// dropped.
    pub fn commit(&self, path: &Path) -> Critical {
        self.enter(path, Stage::Commit)
    }

    fn enter(&self, path: &Path, stage: Stage) -> Critical {
        self.locked().changed = Some(Changed {
            path: path.to_owned(),
            stage,
            warned: false,
        });
        Critical(self.clone())
    }

    /// Records that a file is staged: the next signal cancels the work and does not end the
    /// process.
    pub fn hold(&self) {
        let mut state = self.locked();
        if state.work == Work::Reading {
            state.work = Work::Staged;
        }
    }

    /// Returns a pipe that hangs up once the work is cancelled, for a thread that waits in `poll`.
    /// Only one such pipe may be in use: the next call closes the one before.
    pub fn hangs_up(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        let state = self.locked();
        if state.work != Work::Cancelled {
            *locked(&self.waiting) = Some(writer);
        }
        Ok(reader)
    }

    /// Returns a pipe that gets a byte for each signal, for a verb that decides itself what a
    /// signal does.
    #[cfg(target_os = "linux")]
    pub fn forward(&self) -> io::Result<PipeReader> {
        let (reader, writer) = io::pipe()?;
        *locked(&self.forwarded) = Some(writer);
        Ok(reader)
    }

    /// Records that nothing is staged: the next signal ends the process.
    pub fn release(&self) {
        let mut state = self.locked();
        if state.work == Work::Staged {
            state.work = Work::Reading;
        }
    }

    /// Returns the token of the work, which a signal cancels while a file is staged.
    pub fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }
}

/// A section in which a file is changed, until this is dropped. See [`Interrupt::overwrite`] and
/// [`Interrupt::commit`].
#[derive(Debug)]
pub struct Critical(Interrupt);

impl Critical {
    /// Records that all of the RAM is written, and only has to reach its disk.
    pub fn written(&self) {
        self.set(Stage::Whole);
    }

    /// Records that the RAM is being emptied.
    pub fn emptying(&self) {
        self.set(Stage::Part);
    }

    /// Records that the result is in place, and only has to be reported.
    pub fn done(&self) {
        self.set(Stage::Done);
    }

    fn set(&self, stage: Stage) {
        if let Some(changed) = &mut self.0.locked().changed {
            changed.stage = stage;
        }
    }
}

impl Drop for Critical {
    fn drop(&mut self) {
        self.0.locked().changed = None;
    }
}

/// Ignores poisoning: no code under these locks can panic with the state half changed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the signals by which a terminal suspends a process. SIGSTOP cannot be blocked.
fn suspending() -> SigSet {
    SigSet::from_iter([Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU])
}

/// A block on the signals that suspend this process, in this thread and the threads that it starts.
///
/// If this process were suspended, a process that it has stopped would stay stopped. A blocked
/// signal suspends this process once this is dropped, unless SIGCONT came before.
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
