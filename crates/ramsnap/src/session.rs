//! What every verb has at hand: progress, signals, warnings.

use std::io::{self, PipeReader};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use memory_writer::{MemoryWriter, Options};

use crate::failure::Failure;
use crate::interrupt::{Interrupt, Overwriting};
use crate::print;

#[derive(Clone, Debug)]
pub struct Session {
    quiet: bool,
    bars: bool,
    interrupt: Interrupt,
}

impl Session {
    pub fn begin(quiet: bool) -> anyhow::Result<Self> {
        let interrupt = Interrupt::listen().context(
            "cannot start the thread that listens for signals: raise the limit of threads and processes (ulimit -u, \
             pids.max), or end some",
        )?;
        Ok(Self {
            quiet,
            bars: !quiet,
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

    /// A bar on stderr, if that is a terminal.
    pub fn bar(&self, what: &str) -> ProgressBar {
        let target = match self.bars {
            false => ProgressDrawTarget::hidden(),
            true => ProgressDrawTarget::stderr(),
        };
        let style = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}";
        let style = ProgressStyle::with_template(style).expect("a template of known parts");
        ProgressBar::with_draw_target(Some(0), target)
            .with_style(style)
            .with_message(what.to_owned())
            .with_finish(ProgressFinish::AndClear)
    }

    /// A writer's options, with a bar, that a signal cancels. From now on signals clean up first.
    pub fn options(&self, what: &str) -> Options {
        let bar = self.bar(what);
        MemoryWriter::options()
            .cancel(self.interrupt.hold())
            .progress(move |progress| {
                bar.set_length(progress.bytes_total);
                bar.set_position(progress.bytes_done);
            })
    }

    /// From now on, signals don't end the process: whoever calls this asks [`Self::check`] now and
    /// then.
    pub fn hold(&self) {
        self.interrupt.hold();
    }

    /// From now on, and until what is returned is dropped, the RAM at `path` holds a part of what
    /// it is to hold: signals that come meanwhile don't end the process before they have said so.
    pub fn overwrite(&self, path: &Path) -> Overwriting {
        self.interrupt.overwrite(path)
    }

    /// What progress functions return.
    pub fn flow(&self) -> ControlFlow<()> {
        match self.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Returns a pipe that hangs up once a signal has come while something was staged.
    pub fn hangs_up(&self) -> io::Result<PipeReader> {
        self.interrupt.hangs_up()
    }

    /// From now on, signals end the process again; an error if one has come.
    pub fn release(&self) -> Result<(), Failure> {
        self.interrupt.release();
        self.check("nothing was written")
    }

    /// Whether a signal has come while something was staged.
    pub fn is_cancelled(&self) -> bool {
        self.interrupt.is_cancelled()
    }

    /// An error once a signal has come, after which there is what `left` says.
    pub fn check(&self, left: &'static str) -> Result<(), Failure> {
        match self.is_cancelled() {
            true => Err(Failure::Interrupted { left }),
            false => Ok(()),
        }
    }

    /// Something to know that is no failure.
    pub fn warn(&self, text: &str) {
        print::complain(&format!("warning: {text}"));
    }

    /// What goes on: to stdout, unless quiet.
    pub fn say(&self, text: &str) -> anyhow::Result<()> {
        match self.quiet {
            true => Ok(()),
            false => print::line(text),
        }
    }

    /// What was done: to stdout, unless quiet. A failure says that it was done, and what.
    pub fn report(&self, text: &str) -> Result<(), Failure> {
        match self.quiet {
            true => Ok(()),
            false => Self::report_as_asked(text),
        }
    }

    /// The same where it was asked for.
    pub fn report_as_asked(text: &str) -> Result<(), Failure> {
        print::try_line(text).map_err(|source| Failure::NotReported {
            report: text.to_owned(),
            source,
        })
    }
}
