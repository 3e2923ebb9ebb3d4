//! The table of the live snapshots.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, HumanCount};

use super::capture::Capture;

/// What the columns are.
pub(super) const LEGEND: &str = "Pause: from the request to stop the vCPUs until they are resumed, with the capture of their state; `freeze` is the part of the crate live-snapshot. Work: ledger entries of all vCPUs per second, before the snapshot, from its begin until the image is durable, and after it. After a snapshot, the first write to each page faults, in the next method too.";

/// Returns a row for each figure, and a column for each method.
pub(super) fn table(captures: &[Capture]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let mut row = |name: &str, figure: &dyn Fn(&Capture) -> String| {
        let mut cells = vec![name.to_owned()];
        cells.extend(captures.iter().map(figure));
        table.add_row(cells);
    };
    row("", &|it| it.report.method.to_string());
    row("pause", &|it| microseconds(it.pause));
    row("freeze", &|it| microseconds(it.report.freeze));
    row("prepared in", &|it| milliseconds(it.report.prepared_in));
    row("durable after the pause", &|it| {
        milliseconds(it.times.durable - it.times.resumed)
    });
    row("protected in the pause", &|it| {
        bytes(it.report.protected_in_pause)
    });
    row("copied before write", &|it| {
        bytes(it.report.copied_before_write)
    });
    row("peak of the pool", &|it| bytes(it.report.pool_peak));
    row("work before", &|it| work(before(it), None));
    row("work during", &|it| work(during(it), Some(before(it))));
    row("work after", &|it| work(after(it), Some(before(it))));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Returns the work rate before the snapshot.
pub(super) fn before(capture: &Capture) -> f64 {
    capture.samples.rate(Duration::ZERO, capture.times.begun)
}

fn during(capture: &Capture) -> f64 {
    let times = capture.times;
    capture.samples.rate(times.begun, times.durable)
}

fn after(capture: &Capture) -> f64 {
    let samples = &capture.samples;
    samples.rate(capture.times.durable, samples.end())
}

fn work(rate: f64, before: Option<f64>) -> String {
    let count = HumanCount(rate as u64);
    match before {
        Some(before) => format!("{count} ({:.0} %)", rate / before.max(1.0) * 100.0),
        None => count.to_string(),
    }
}

fn bytes(count: u64) -> String {
    BinaryBytes(count).to_string()
}

pub(super) fn microseconds(time: Duration) -> String {
    format!("{} µs", HumanCount(time.as_micros() as u64))
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", HumanCount(time.as_millis() as u64))
}
