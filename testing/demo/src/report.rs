//! What the reader sees while the demo runs, and the table at its end.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use harness::interrupt::Interrupt;
use indicatif::{BinaryBytes, HumanCount, ProgressBar, ProgressStyle};

/// One progress bar for all phases, on standard error. Prints nothing if that is not a terminal.
/// [`at`](Self::at) and [`interrupted`](Self::interrupted) return an error once the user has
/// interrupted the program.
#[derive(Clone)]
pub(crate) struct Progress {
    bar: ProgressBar,
    interrupt: Interrupt,
}

impl Progress {
    pub(crate) fn new(interrupt: Interrupt) -> Self {
        let bar = ProgressBar::new(0);
        let template = "{msg:36} {wide_bar:.cyan} {percent:>3} %";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well-formed"));
        Self { bar, interrupt }
    }

    /// Returns a progress bar that prints nothing.
    #[cfg(test)]
    pub(crate) fn hidden() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            interrupt: Interrupt::default(),
        }
    }

    /// Begins a phase of `total` units of any kind.
    pub(crate) fn phase(&self, name: impl Into<String>, total: u64) {
        self.bar.set_message(name.into());
        self.bar.set_length(total);
        self.bar.set_position(0);
    }

    /// Sets the position in the phase. Returns an error if the demo was asked to end.
    pub(crate) fn at(&self, done: u64) -> anyhow::Result<()> {
        self.bar.set_position(done);
        self.interrupted()
    }

    /// Returns an error if the demo was asked to end.
    pub(crate) fn interrupted(&self) -> anyhow::Result<()> {
        self.interrupt.check()
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Prints a line. A closed pipe (`| head`) is not an error; the exit code still reports the result.
pub(crate) fn say(line: impl Display) -> io::Result<()> {
    match writeln!(io::stdout(), "{line}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// The figures of one snapshot.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub name: String,
    /// Bytes of the guest's RAM.
    pub ram: u64,
    /// Pages that the guest wrote since the snapshot before; for a full one, while it was being
    /// copied.
    pub dirty_pages: u64,
    /// Bytes written to the memory file.
    pub written: u64,
    /// Bytes that the file system holds for the memory file.
    pub allocated: u64,
    /// How long the guest was paused.
    pub paused: Duration,
    /// From the start of the snapshot until it would survive a loss of power.
    pub durable: Duration,
}

/// What stands above the picture.
pub(crate) const LEGEND: &str = "Dirty pages of each snapshot, by their place in the RAM. A cell's height grows with the share that is dirty.";

/// The table of all snapshots.
pub(crate) fn table(snapshots: &[Snapshot]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        "snapshot",
        "RAM",
        "dirty pages",
        "written",
        "allocated",
        "guest paused",
        "durable after",
    ]);
    for snapshot in snapshots {
        table.add_row([
            snapshot.name.clone(),
            BinaryBytes(snapshot.ram).to_string(),
            HumanCount(snapshot.dirty_pages).to_string(),
            BinaryBytes(snapshot.written).to_string(),
            BinaryBytes(snapshot.allocated).to_string(),
            milliseconds(snapshot.paused),
            milliseconds(snapshot.durable),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}
