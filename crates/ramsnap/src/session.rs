//! Services for every verb: progress, signals, warnings.

use std::io::{self, PipeReader};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use memory_writer::{CancelToken, MemoryWriter, MemoryWriterOptions, Progress};

use crate::failure::Failure;
use crate::interrupt::{Critical, Interrupt};
use crate::print;
use crate::stderr;

/// The parts of a progress bar.
const BAR: &str = "{msg} {wide_bar} {percent}%, {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";

#[derive(Clone, Debug)]
pub struct Session {
    quiet: bool,
    bars: bool,
    interrupt: Interrupt,
}

impl Session {
    /// Begins a session. It shows progress bars if `bars` is set and `quiet` is not.
    pub fn begin(quiet: bool, bars: bool) -> anyhow::Result<Self> {
        let interrupt = Interrupt::listen().context(
            "cannot start the thread that listens for signals: raise the limit of threads and processes (ulimit -u, \
             pids.max), or end some",
        )?;
        Ok(Self {
            quiet,
            bars: bars && !quiet,
            interrupt,
        })
    }

    /// Returns the same session without bars, for a verb that stops a process: a terminal that
    /// takes no output (Ctrl-S, a stalled ssh) would keep the process stopped.
    #[cfg(target_os = "linux")]
    pub fn without_bars(&self) -> Self {
        Self {
            bars: false,
            ..self.clone()
        }
    }

    /// Returns a progress function that draws a bar, and that a signal breaks if a file is staged.
    pub fn progress(&self, what: &str) -> impl FnMut(Progress) -> ControlFlow<()> + Send + use<> {
        let (bar, cancel) = (self.bar(what), self.cancel_token().clone());
        move |progress| {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
            cancel.flow()
        }
    }

    /// Returns a progress bar on stderr, which is hidden unless stderr is a terminal.
    pub fn bar(&self, what: &str) -> ProgressBar {
        let target = match self.bars {
            false => ProgressDrawTarget::hidden(),
            true => ProgressDrawTarget::stderr(),
        };
        let style = ProgressStyle::with_template(BAR).expect("a template of known parts");
        ProgressBar::with_draw_target(Some(0), target)
            .with_style(style)
            .with_message(what.to_owned())
            .with_finish(ProgressFinish::AndClear)
    }

    /// Returns options of a writer with a progress bar, which a signal cancels. From now on,
    /// signals do not end the process at once.
    pub fn options(&self, what: &str) -> MemoryWriterOptions {
        self.hold();
        MemoryWriter::options().progress(self.progress(what))
    }

    /// Keeps signals from ending the process. The caller must call [`Self::check`] regularly.
    pub fn hold(&self) {
        self.interrupt.hold();
    }

    /// Records that the RAM at `path` is being overwritten, until the returned value is dropped. A
    /// signal during this time does not end the process before a message states it.
    pub fn overwrite(&self, path: &Path) -> Critical {
        self.interrupt.overwrite(path)
    }

    /// Records that a staged file is being put in place at `path`, until the returned value is
    /// dropped. A signal during this time does not end the process before a message states it.
    pub fn commit(&self, path: &Path) -> Critical {
        self.interrupt.commit(path)
    }

    /// Returns the token that a signal cancels while something is staged.
    pub fn cancel_token(&self) -> &CancelToken {
        self.interrupt.cancel_token()
    }

    /// Returns a pipe that hangs up once a signal has come while something was staged.
    pub fn hangs_up(&self) -> io::Result<PipeReader> {
        self.interrupt.hangs_up()
    }

    /// Returns a pipe that gets a byte for each signal, which does nothing else from now on.
    #[cfg(target_os = "linux")]
    pub fn signals_as_bytes(&self) -> io::Result<PipeReader> {
        self.interrupt.forward()
    }

    /// Lets signals end the process again.
    ///
    /// # Errors
    /// If a signal has come.
    pub fn release(&self) -> Result<(), Failure> {
        self.interrupt.release();
        self.check("nothing was written")
    }

    /// Returns whether a signal has come while something was staged.
    pub fn is_cancelled(&self) -> bool {
        self.cancel_token().is_cancelled()
    }

    /// Returns an error if a signal has come. `left` describes the state that is left behind.
    pub fn check(&self, left: &'static str) -> Result<(), Failure> {
        match self.is_cancelled() {
            true => Err(Failure::Interrupted { left }),
            false => Ok(()),
        }
    }

    /// Prints a warning.
    pub fn warn(&self, text: &str) {
        stderr::line(&format!("warning: {text}"));
    }

    /// Prints a message about the progress to stdout, unless quiet.
    pub fn say(&self, text: &str) -> anyhow::Result<()> {
        match self.quiet {
            true => Ok(()),
            false => print::line(text),
        }
    }

    /// Prints the result to stdout, unless quiet. The error states that the work is done, and the
    /// result.
    pub fn report(&self, text: &str) -> Result<(), Failure> {
        match self.quiet {
            true => Ok(()),
            false => Self::report_as_asked(text),
        }
    }

    /// Prints the result to stdout, also if quiet: the user requested it.
    pub fn report_as_asked(text: &str) -> Result<(), Failure> {
        print::try_line(text).map_err(|source| Failure::NotReported {
            report: text.to_owned(),
            source,
        })
    }
}
