//! `cargo xtask bench`: the comparison with peers and with the limit, as a page with charts.

mod page;

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use figures::report::Report;
use xshell::{Shell, cmd};

/// Compare writing and marking with other programs and a bare writer, in one run
///
/// Prints the ratios as they are found, and writes docs/benchmarks.md and its charts. It takes
/// about ten minutes and up to 40 GiB of space on the measured disk. `cargo bench` runs the same
/// contenders under criterion.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// The directory to write to: chooses the file system, which must not be tmpfs [default:
    /// target/bench]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The number of runs of each contender, at least 5
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Run only the cases whose name contains this text, and do not change docs/
    #[arg(long)]
    only: Option<String>,
}

impl Bench {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let target = sh.current_dir().join("target/bench");
        let dir = self.dir.as_ref().unwrap_or(&target);
        fs::create_dir_all(&target)?;
        let json = target.join("ratios.json");
        let rounds = self.rounds.to_string();
        let only = self.only.iter().flat_map(|name| ["--only", name.as_str()]);
        cmd!(
            sh,
            "cargo bench --locked --package benches --bench ratios -- --dir {dir} --rounds {rounds} --json {json} {only...}"
        )
        .run()?;
        if self.only.is_some() {
            return Ok(());
        }
        let text = fs::read(&json).with_context(|| format!("can't read {}", json.display()))?;
        let report: Report = serde_json::from_slice(&text)?;
        page::save(&report, &sh.current_dir().join("docs"))
    }
}
