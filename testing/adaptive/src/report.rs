//! The comparison of the policies, as text, as a page, and as a chart.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use dirty_bitmap::{Costs, Policy};
use figures::chart::{Bars, Group};

use super::simulate::{self, Cost};
use super::trace::{Kind, Trace};

pub(crate) const PAGE: &str = "adaptive-tracking.md";
pub(crate) const CHART: &str = "adaptive-tracking.svg";

/// The policies compared.
pub(crate) const POLICIES: [(&str, Policy); 4] = [
    ("always pages", Policy::Pages),
    ("always blocks", Policy::Blocks),
    ("fixed threshold", Policy::FaultLimit(32)),
    ("adaptive", Policy::Cost(COSTS)),
];
/// The index of the adaptive policy in [`POLICIES`].
pub(crate) const ADAPTIVE: usize = 3;

/// The default costs of the tracker.
const COSTS: Costs = Costs::DEFAULT;

pub(crate) struct Report {
    pub rows: Vec<Row>,
}

/// The costs of a trace under each of [`POLICIES`].
pub(crate) struct Row {
    pub name: String,
    pub about: String,
    pub kind: Kind,
    pub page_size: u64,
    pub costs: Vec<Cost>,
}

impl Row {
    /// Returns the lowest total among the policies other than the adaptive one.
    pub(crate) fn best_other(&self) -> Duration {
        let others = self.costs.iter().enumerate();
        let others = others.filter(|(at, _)| *at != ADAPTIVE);
        let best = others.map(|(_, cost)| cost.total()).min();
        best.expect("there are others")
    }

    /// Returns the ratio of the adaptive policy's total to the lowest of the others.
    pub(crate) fn ratio(&self) -> f64 {
        self.costs[ADAPTIVE]
            .total()
            .div_duration_f64(self.best_other())
    }
}

impl Report {
    pub(crate) fn of(traces: &[Trace]) -> Self {
        let row = |trace: &Trace| Row {
            name: trace.name.clone(),
            about: trace.about.clone(),
            kind: trace.kind,
            page_size: trace.page_size,
            costs: POLICIES
                .iter()
                .map(|(_, policy)| simulate::run(trace, *policy, COSTS))
                .collect(),
        };
        Self {
            rows: traces.iter().map(row).collect(),
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        let names = POLICIES.iter().map(|(name, _)| *name);
        table.set_header(
            ["trace"]
                .into_iter()
                .chain(names)
                .chain(["ratio to the best other"]),
        );
        for row in &self.rows {
            let totals = row.costs.iter().map(|cost| milliseconds(cost.total()));
            let ratio = format!("{:.2}", row.ratio());
            let cells = [row.name.clone()].into_iter().chain(totals).chain([ratio]);
            table.add_row(cells);
        }
        format!("{table}\n")
    }

    /// Writes the page and its chart to `dir`.
    pub(crate) fn save(&self, dir: &Path) -> anyhow::Result<()> {
        fs::write(dir.join(PAGE), self.page())?;
        fs::write(dir.join(CHART), self.chart().svg()?)?;
        Ok(())
    }

    /// Returns a chart of the costs of each trace, relative to the best other policy. Each bar has
    /// writing at the bottom and faults on top.
    fn chart(&self) -> Bars {
        let group = |row: &Row| {
            let times = |time: Duration| time.div_duration_f64(row.best_other());
            let bar = |cost: &Cost| vec![times(cost.writing), times(cost.faulting)];
            Group {
                name: row.name.clone(),
                bars: row.costs.iter().map(bar).collect(),
            }
        };
        Bars {
            axis: "time relative to the best other policy (dark: writing, light: faults)".into(),
            most: 2.0,
            series: POLICIES.map(|(name, _)| name.into()).to_vec(),
            groups: self.rows.iter().map(group).collect(),
        }
    }

    fn page(&self) -> String {
        let mut page = String::from(HEAD);
        let (fault, write_mib) = (COSTS.fault, COSTS.write_mib);
        _ = write!(
            page,
            "Total time with the default costs, {fault:?} for a fault and {write_mib:?} for 1 MiB \
             written:\n\n"
        );
        page += "| trace | ";
        page += &POLICIES.map(|(name, _)| name).join(" | ");
        page += " | ratio |\n|---|---:|---:|---:|---:|---:|\n";
        for row in &self.rows {
            let totals = row.costs.iter().map(|cost| milliseconds(cost.total()));
            let totals: Vec<String> = totals.collect();
            let mixed = if row.kind == Kind::Mixed {
                " (mixed)"
            } else {
                ""
            };
            let (name, ratio) = (&row.name, row.ratio());
            _ = writeln!(
                page,
                "| {name}{mixed} | {} | {ratio:.2} |",
                totals.join(" | ")
            );
        }
        page += PARTS;
        page += &POLICIES.map(|(name, _)| name).join(" | ");
        page += " |\n|---|---:|---:|---:|---:|\n";
        for row in &self.rows {
            let parts = row.costs.iter().map(|cost| {
                let (written, clean) = (cost.bytes >> 20, cost.clean >> 20);
                format!("{} / {written}, {clean}", cost.faults)
            });
            let parts: Vec<String> = parts.collect();
            _ = writeln!(page, "| {} | {} |", row.name, parts.join(" | "));
        }
        page += "\nThe traces:\n\n";
        for row in &self.rows {
            let size = row.page_size >> 10;
            let item = format!("- **{}** ({size} KiB pages): {}", row.name, row.about);
            page += &wrapped_item(&item);
        }
        page + TAIL
    }
}

/// Wraps a list item at 100 columns.
fn wrapped_item(item: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in item.split(' ') {
        if column > 0 && column + 1 + word.len() > 100 {
            text += "\n ";
            column = 1;
        }
        if column > 0 {
            text.push(' ');
            column += 1;
        }
        text += word;
        column += word.len();
    }
    text + "\n"
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

const HEAD: &str = "\
<!-- Generated by `cargo xtask adaptive`. A test compares it with a run. -->
# Adaptive tracking

A tracker that finds writes by page faults chooses how much each fault unprotects. If a fault
unprotects one page, diffs are small, but the guest waits at every page. If a fault unprotects
2 MiB, the guest waits once, but diffs contain clean pages. `WriteTracker` chooses for each 2 MiB
block at each checkpoint.

This page compares its policies over traces of guest writes. The tracker is the real one. The
memory is simulated as a set of protected pages. The cost of a run is the time of all faults and of
all bytes written.

![time of faults and of writing, by trace and policy](adaptive-tracking.svg)

";

const PARTS: &str = "
The ratio is that of the adaptive policy to the best other policy. A mixed trace has blocks that
suit different granularities.

Faults / MiB written, and MiB of clean pages among them:

| trace | ";

const TAIL: &str = "
## How the tracker chooses

A block that was unprotected page by page was observed exactly: it had one fault for each page that
the guest wrote. Unprotecting the whole block would have cost one fault and the bytes of its clean
pages. The difference is averaged over checkpoints, where each new one has a weight of one quarter.
Its sign decides which is cheaper.

A block that was unprotected as a whole is not observed. Therefore one sixteenth of it stays
protected, a different part each time. The faults in that part are a sample of the pages that the
guest writes. At first, each checkpoint has a sample, and the block is only unprotected after some
faults: an eighth of its pages, halved each time that a sample confirms the choice. After four
confirmations, the first fault unprotects the block, and one checkpoint in eight has a sample. A
block that is not written in an interval, or whose writes become sparse, therefore costs no more
than its faults.

Comparing the pages with checksums of the last image would give the same information without any
fault. It would read every page and need 8 bytes of memory for each. A sample costs at most a fault
for each of the pages in a sixteenth of the block. With pages of 16 KiB, these are 8 faults (39 us),
and writing the block takes 1.25 ms.

A sequential write is detected at the border of a block. A fault in the first or last page
unprotects the whole block if every page of the adjacent block was unprotected in the same interval.

The fixed threshold is a trigger on the number of faults: the 33rd fault in a block after a
checkpoint unprotects the rest of the block.
";
