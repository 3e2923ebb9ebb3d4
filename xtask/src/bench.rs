//! `cargo xtask bench`: the comparison with peers and with the limit, as a page with charts.

mod page;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use figures::report::{Part, Report};
use xshell::{Shell, cmd};

/// Compare with other programs and with what the disk or a bare program can do, in one run
///
/// Prints the ratios as they are found. Writes docs/benchmarks.md and its charts (writing and
/// marking, about ten minutes and up to 40 GiB of space on the measured disk),
/// docs/benchmarks-live.md (live snapshots of a KVM guest) and docs/benchmarks-serving.md (the page
/// server). Nothing else should run beside it. `cargo bench` runs the same contenders under
/// criterion.
#[derive(clap::Args)]
pub(crate) struct Bench {
    /// The directory to write to: chooses the file system, which must not be tmpfs [default:
    /// target/bench]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The number of runs of each contender, at least 5
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Run only this part, and write its page: writing, live or serving [default: all]
    #[arg(long)]
    part: Option<Part>,
    /// Run only the cases whose name contains this text, and do not change docs/
    #[arg(long)]
    only: Option<String>,
}

impl Bench {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let target = sh.current_dir().join("target/bench");
        fs::create_dir_all(&target)?;
        for part in Part::ALL {
            if self.part.is_none_or(|only| only == part) {
                self.run_part(sh, part, &target)?;
            }
        }
        Ok(())
    }

    fn run_part(&self, sh: &Shell, part: Part, target: &Path) -> anyhow::Result<()> {
        let name = part.name();
        let json = target.join(format!("{name}.json"));
        let dir = self.dir.as_deref().unwrap_or(target);
        let rounds = self.rounds.to_string();
        let only = self.only.iter().flat_map(|name| ["--only", name.as_str()]);
        cmd!(
            sh,
            "cargo bench --locked --package benches --bench ratios -- --part {name} --dir {dir} --rounds {rounds} --json {json} {only...}"
        )
        .run()?;
        if self.only.is_some() {
            return Ok(());
        }
        let text = fs::read(&json).with_context(|| format!("can't read {}", json.display()))?;
        let report: Report = serde_json::from_slice(&text)?;
        page::save(part, &report, &sh.current_dir().join("docs"))
    }
}
