//! `cargo xtask adaptive`: what tracking by write faults costs under each policy, over traces of what guests write.
//!
//! The tracker is the real one; only the memory is simulated: a set of protected pages.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod record;
mod report;
mod simulate;
mod trace;
mod workloads;

use std::path::PathBuf;

use anyhow::Context;
use xshell::Shell;

use report::Report;
use trace::Trace;

/// Where the trace of the demo's guest is kept, from the workspace's root.
const RECORDED: &str = "xtask/traces/kvm-demo.trace";

/// Compare the policies of the write tracker over traces of what guests write
///
/// Charges the time of every fault and of every byte that a checkpoint writes, at the tracker's default costs. The result is
/// docs/adaptive-tracking.md and its charts; it is the same on every machine.
#[derive(clap::Args)]
pub struct Adaptive {
    /// Write the page and its charts to this directory
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// Record the demo's KVM guest anew first
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[arg(long)]
    record: bool,
}

impl Adaptive {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let recorded = sh.current_dir().join(RECORDED);
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        if self.record {
            record::kvm_demo()?.save(&recorded)?;
        }
        let report = Report::of(&traces(Trace::load(&recorded)?));
        print!("{}", report.text());
        report
            .save(&self.out)
            .with_context(|| format!("can't write to {}", self.out.display()))?;
        println!("written: {}", self.out.join(report::PAGE).display());
        Ok(())
    }
}

/// Every trace that the policies are compared over.
fn traces(recorded: Trace) -> Vec<Trace> {
    let mut traces = workloads::all();
    traces.push(recorded);
    traces
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::report::{ADAPTIVE, Kind};
    use super::*;

    fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
    }

    fn report() -> Report {
        Report::of(&traces(Trace::load(&root().join(RECORDED)).unwrap()))
    }

    #[test]
    fn adaptive_is_within_a_tenth_of_the_best_on_every_trace_and_best_on_the_mixed_ones() {
        for row in report().rows {
            let adaptive = row.costs[ADAPTIVE].total();
            let best = row.best_other();
            assert!(
                adaptive <= best + best / 10,
                "{}: {adaptive:?} to {best:?}",
                row.name
            );
            if row.kind == Kind::Mixed {
                assert!(adaptive < best, "{}: {adaptive:?} to {best:?}", row.name);
            }
        }
    }

    /// What is published is what a run gives.
    #[test]
    fn the_page_and_its_charts_are_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        report().save(dir.path()).unwrap();
        for file in fs::read_dir(dir.path()).unwrap() {
            let file = file.unwrap();
            let published = fs::read_to_string(root().join("docs").join(file.file_name()));
            assert!(
                published.unwrap() == fs::read_to_string(file.path()).unwrap(),
                "{:?}: run `cargo xtask adaptive`",
                file.file_name()
            );
        }
    }
}
