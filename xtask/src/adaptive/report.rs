//! The comparison, as text, as a page, and as charts.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use dirty_bitmap::{Costs, Policy};

use super::simulate::{self, Cost};
use super::trace::Trace;
use crate::chart::{Bars, Group};

pub const PAGE: &str = "adaptive-tracking.md";
pub const CHART: &str = "adaptive-tracking.svg";

/// Whether a trace suits one granularity all over, or different ones in different places.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    Plain,
    Mixed,
}

/// The policies compared.
pub const POLICIES: [(&str, Policy); 4] = [
    ("always pages", Policy::Pages),
    ("always blocks", Policy::Blocks),
    ("fixed threshold", Policy::FaultLimit(32)),
    ("adaptive", Policy::Cost(COSTS)),
];
/// Which of them is what this is about.
pub const ADAPTIVE: usize = 3;

/// The tracker's own defaults.
const COSTS: Costs = Costs::DEFAULT;

pub struct Report {
    pub rows: Vec<Row>,
}

/// A trace, under each of [`POLICIES`].
pub struct Row {
    pub name: String,
    pub about: String,
    pub kind: Kind,
    pub page_size: u64,
    pub costs: Vec<Cost>,
}

impl Row {
    /// The total of the best policy but the adaptive one.
    pub fn best_other(&self) -> Duration {
        let others = self.costs.iter().enumerate();
        let others = others.filter(|(at, _)| *at != ADAPTIVE);
        let best = others.map(|(_, cost)| cost.total()).min();
        best.expect("there are others")
    }

    /// The adaptive policy's total, as many times the best other one's.
    pub fn ratio(&self) -> f64 {
        self.costs[ADAPTIVE]
            .total()
            .div_duration_f64(self.best_other())
    }
}

impl Report {
    pub fn of(traces: &[Trace]) -> Self {
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

    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED);
        let names = POLICIES.iter().map(|(name, _)| *name);
        table.set_header(
            ["trace"]
                .into_iter()
                .chain(names)
                .chain(["to the best other"]),
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
    pub fn save(&self, dir: &Path) -> anyhow::Result<()> {
        fs::write(dir.join(PAGE), self.page())?;
        fs::write(dir.join(CHART), self.chart().svg()?)?;
        Ok(())
    }

    /// Each trace's costs in times the best other policy's: writing, and on top of it the faults.
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
            axis: "time, in times the best policy's but adaptive (dark: writing, light: faults)"
                .into(),
            most: 2.0,
            series: POLICIES.map(|(name, _)| name.into()).to_vec(),
            groups: self.rows.iter().map(group).collect(),
        }
    }

    fn page(&self) -> String {
        let mut page = String::from(HEAD);
        let (fault, mebibyte) = (COSTS.fault, COSTS.mebibyte);
        _ = write!(
            page,
            "Charged: {fault:?} for a fault and {mebibyte:?} for a MiB written, the tracker's defaults.\n\n"
        );
        page += "| trace | ";
        page += &POLICIES.map(|(name, _)| name).join(" | ");
        page += " | adaptive to the best other |\n|---|---:|---:|---:|---:|---:|\n";
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
        page += "\nWhat that was made of: faults / MiB written, of which clean.\n\n| trace | ";
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
            _ = writeln!(page, "- **{}** ({size} KiB pages): {}", row.name, row.about);
        }
        page + TAIL
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

const HEAD: &str = "\
<!-- Made by `cargo xtask adaptive`; a test compares it with a run. -->
# What adaptive tracking saves

Where writes are noticed by faults, a fault that opens one page keeps diffs small and makes the guest wait at every page; one that opens 2 MiB makes
the guest wait once and the diff write what is clean. `WriteTracker` chooses for each 2 MiB block, at each checkpoint. Here its policies are compared
over traces of what guests write: the tracker is the real one, memory is a set of protected pages, and all
faults and all bytes written are charged.

![time of faults and of writing, by trace and policy](adaptive-tracking.svg)

";

const TAIL: &str = "
## How it chooses

A block that was opened page by page shows exactly what it did: as many faults as pages the guest wrote. Opened whole it would have cost one fault, and
the bytes of the pages that stayed clean. The difference, averaged over checkpoints (each new one counts a quarter), says which is cheaper.

A block that is opened whole shows nothing more. So a sixteenth of it stays protected, another part each time: the faults there are a sample of how much of
it is really written. While a block is new to it, that happens at every checkpoint, and the block is opened only after some faults: an eighth of its
pages, and half as many each time that the sample confirms the choice. After four times, the first fault opens it, and one checkpoint in eight samples. A
block that is left alone for an interval, or is written here and there again, so costs no more than its faults.
Comparing the pages with checksums of the last image would show the same without any fault, but takes a read of every page and 8 bytes of memory for each; a
sample costs at most a fault for each 16 of its pages (of 16 KiB, 8 faults: 39 us) where the block writes 2 MiB (1.25 ms).

Whoever writes all memory in turn is met at the border: a fault in the first or last page of a block whose neighbour there was written from
end to end in the same interval opens the block whole.

The fixed threshold is a fault-rate trigger as it works best: block by block, anew after each checkpoint. The 33rd fault in a block opens the rest of it.
";
