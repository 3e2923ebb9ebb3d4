//! What is said of the faults.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;
use comfy_table::{CellAlignment, Table, presets};
use harness::record::Record;
use indicatif::HumanCount;
use xshell::Shell;

use super::injected_fault::{How, InjectedFault};
use super::job::Done;
use super::oracle::FaultViolation;

pub(super) struct Report {
    pub done: Vec<Done>,
    pub mutants: Vec<Done>,
    pub time: Duration,
}

/// Of several scenarios.
#[derive(Default)]
struct Sum {
    faults: usize,
    lost: usize,
    torn: usize,
    leaked: usize,
    untrue: usize,
}

impl Sum {
    fn of<'d>(done: impl IntoIterator<Item = &'d Done>) -> Self {
        let mut sum = Self::default();
        for done in done {
            sum.faults += done.faults.len();
            for (_, violation) in &done.violations {
                *match violation {
                    FaultViolation::Lost(_) => &mut sum.lost,
                    FaultViolation::Torn(_) => &mut sum.torn,
                    FaultViolation::Leaked(_) => &mut sum.leaked,
                    FaultViolation::Untrue(_) => &mut sum.untrue,
                } += 1;
            }
        }
        sum
    }

    fn violations(&self) -> String {
        let Self {
            lost,
            torn,
            leaked,
            untrue,
            ..
        } = self;
        format!("{lost} lost, {torn} torn, {leaked} leaked, {untrue} untrue")
    }
}

/// Reported when a scenario is done.
pub(super) fn line(done: &Done) {
    let sum = Sum::of([done]);
    let not_met = match done.not_met {
        0 => String::new(),
        some => format!(", {some} whose call was not made"),
    };
    println!(
        "{}: {} faults at {} calls: {}{not_met} ({:.1} s)",
        done.case.scenario.name,
        HumanCount(sum.faults as u64),
        done.calls,
        sum.violations(),
        done.time.as_secs_f64()
    );
    if done.blind {
        println!(
            "  NOT RUN: completions of io_uring, whose rings this kernel does not show (before Linux 6.10)"
        );
    }
    /// So that one mistake does not fill the screen.
    const SHOWN: usize = 10;
    for (fault, violation) in done.violations.iter().take(SHOWN) {
        println!("  {fault}: {violation}");
        let name = done.case.scenario.name;
        println!("  repeat with: cargo xtask faults --only {name} --fault '{fault}'");
    }
    if done.violations.len() > SHOWN {
        println!("  and {} more", done.violations.len() - SHOWN);
    }
}

/// Reported when a mutant is done.
pub(super) fn mutant_line(done: &Done) {
    let name = done.case.scenario.name;
    match done.violations.first() {
        Some((fault, violation)) => println!("mutant {name}: detected by {fault}: {violation}"),
        None => println!(
            "mutant {name}: not detected by {} faults",
            done.faults.len()
        ),
    }
}

impl Report {
    /// Prints the table and the sum, and fails where a fault or a mutant says so.
    pub(super) fn conclude(&self, sh: &Shell, record: Record, chosen: &str) -> anyhow::Result<()> {
        println!("{}", self.table());
        let sum = Sum::of(&self.done);
        println!("in {} s", self.time.as_secs());
        let said = format!(
            "{} faults in {} scenarios, {}",
            HumanCount(sum.faults as u64),
            self.done.len(),
            sum.violations()
        );
        let how = format!("{chosen}, {} s", self.time.as_secs());
        record.conclude(sh, "cargo xtask faults", &said, &how)?;
        if self.done.iter().any(|done| !done.violations.is_empty()) {
            bail!("a fault violates an invariant");
        }
        let missed = self
            .mutants
            .iter()
            .filter(|done| done.violations.is_empty());
        let missed: Vec<_> = missed.map(|done| done.case.scenario.name).collect();
        if !missed.is_empty() {
            bail!("mutants not detected: {}", missed.join(", "));
        }
        Ok(())
    }

    /// How often each call went wrong, and how.
    fn table(&self) -> Table {
        const WAYS: [&str; 6] = [
            "error",
            "answer lost",
            "short",
            "killed",
            "and then EIO",
            "full",
        ];
        let mut rows: BTreeMap<&str, [usize; WAYS.len()]> = BTreeMap::new();
        for fault in self.done.iter().flat_map(|done| &done.faults) {
            let (call, way) = match fault {
                InjectedFault::Twice(at, _) => (at.kind.name, 4),
                InjectedFault::Room(_) => ("(no room)", 5),
                InjectedFault::Limit(_) => ("(RLIMIT_FSIZE)", 5),
                InjectedFault::Call(at) => {
                    let way = match at.how {
                        How::Error(_) => 0,
                        How::Lost(_) => 1,
                        How::Short(_) => 2,
                        How::Kill => 3,
                    };
                    (at.kind.name, way)
                }
            };
            rows.entry(call).or_default()[way] += 1;
        }
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(std::iter::once("call").chain(WAYS));
        for (call, counts) in rows {
            let count = |count: usize| {
                if count == 0 {
                    String::new()
                } else {
                    count.to_string()
                }
            };
            table.add_row(std::iter::once(call.to_owned()).chain(counts.map(count)));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}
