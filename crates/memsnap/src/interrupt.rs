//! Signals: SIGINT and SIGTERM.
//!
//! As long as nothing is staged, a signal ends the process at once. While something is, the first one cancels the work, whose staged file
//! is removed on the way out; a second one ends the process anyway, and what is staged is left for the next writer to find and remove.

use std::io;
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use memory_writer::CancelToken;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::failure::INTERRUPTED;
use crate::print;

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
}

impl Interrupt {
    /// Listens from now on, on a thread of its own.
    pub fn listen() -> io::Result<Self> {
        let interrupt = Self {
            work: Arc::new(Mutex::new(Work::Reading)),
            cancel: CancelToken::new(),
        };
        // Otherwise deadly: writing past RLIMIT_FSIZE is to be the error EFBIG.
        flag::register(SIGXFSZ, Arc::default())?;
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let listener = interrupt.clone();
        thread::Builder::new().spawn(move || {
            for _ in signals.forever() {
                listener.signalled();
            }
        })?;
        Ok(interrupt)
    }

    fn signalled(&self) {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if *work == Work::Staged {
            *work = Work::Cancelled;
            self.cancel.cancel();
            return;
        }
        // With the lock held: nobody stages anything in between.
        print::complain("interrupted");
        process::exit(INTERRUPTED.into());
    }

    /// From now on there is something to clean up, until the process ends.
    pub fn hold(&self) -> CancelToken {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if *work == Work::Reading {
            *work = Work::Staged;
        }
        self.cancel.clone()
    }

    /// Nothing is to be cleaned up any more.
    pub fn release(&self) {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if *work == Work::Staged {
            *work = Work::Reading;
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }
}
