//! Computes the costs of tracking by write faults under each policy, over traces of guest writes.
//!
//! The tracker is the real one. The memory is simulated as a set of protected pages. The result is
//! docs/adaptive-tracking.md with its chart.
//!
//! Run it by `cargo xtask adaptive`.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod record;
mod report;
mod simulate;
mod trace;
mod workloads;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use xshell::Shell;

use report::Report;
use trace::Trace;

/// The path of the recorded trace of the demo's guest, relative to the root of the workspace.
const RECORDED: &str = "testing/adaptive/traces/kvm-demo.trace";

/// Compare the policies of the write tracker over traces of guest writes
///
/// The cost of a run is the time of every fault and of every byte that a checkpoint writes, with
/// the tracker's default costs. The result is docs/adaptive-tracking.md and its chart. It is the
/// same on every machine.
#[derive(Parser)]
#[command(name = "cargo xtask adaptive", bin_name = "cargo xtask adaptive")]
struct Adaptive {
    /// Write the page and its charts to this directory
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// Record the demo's KVM guest again first
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[arg(long)]
    record: bool,
}

fn main() -> ExitCode {
    let adaptive = Adaptive::parse();
    harness::run(|sh| adaptive.run(sh))
}

impl Adaptive {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let recorded = sh.current_dir().join(RECORDED);
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        if self.record {
            record::kvm_demo()?.save(&recorded)?;
        }
        let report = Report::of(&traces(Trace::load(&recorded)?));
        print!("{}", report.text());
        report
            .save(&self.out)
            .with_context(|| format!("failed to write to {}", self.out.display()))?;
        println!("written: {}", self.out.join(report::PAGE).display());
        Ok(())
    }
}

/// Returns every trace over which the policies are compared.
fn traces(recorded: Trace) -> Vec<Trace> {
    let mut traces = workloads::all();
    traces.push(recorded);
    traces
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::report::ADAPTIVE;
    use super::trace::Kind;
    use super::*;

    fn root() -> &'static Path {
        harness::workspace().unwrap()
    }

    fn report() -> Report {
        Report::of(&traces(Trace::load(&root().join(RECORDED)).unwrap()))
    }

    #[test]
    fn adaptive_is_near_the_best_and_best_on_mixed_traces() {
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

    #[test]
    fn the_page_and_its_chart_are_up_to_date() {
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
