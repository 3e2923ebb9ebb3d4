//! `cargo xtask mutants`: change the code in small ways, one at a time, and see the tests notice.

use std::fs::File;
use std::io::BufReader;
use std::ops::AddAssign;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use xshell::{Shell, cmd};

use crate::cargo_tool::CargoTool;
use crate::packages::Install;
use crate::recorded::Record;

const TOOL: CargoTool = CargoTool {
    name: "cargo-mutants",
    version: "27.1.0",
};

/// The crates that a lost page would be lost in.
const CRATES: [&str; 4] = [
    "atomic-file",
    "dirty-bitmap",
    "memory-writer",
    "memory-image",
];

/// Of a hundred mutants, so many are to be caught.
const GOAL: usize = 90;

/// Change the code in small ways, one at a time, and see the tests notice
///
/// cargo-mutants makes the changes, in a copy of the workspace; each is tested by the tests of its own crate. .cargo/mutants.toml tells which changes are not
/// made, each with the reason why no test could notice. Exit code 0 says that of every crate 90 % were noticed at least; those that were not
/// are listed. All of them take hours: --shard 0/20 takes one twentieth, of every file some.
#[derive(clap::Args)]
pub struct Mutants {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only these crates, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "CRATE", value_parser = CRATES)]
    only: Vec<String>,
    /// The K-th of N parts of the mutants, from 0 on
    #[arg(long, value_name = "K/N", default_value = "0/1")]
    shard: String,
}

/// What became of the mutants of a crate, as cargo-mutants writes it to outcomes.json.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
struct Outcomes {
    caught: usize,
    /// The tests did not end: as good as caught.
    timeout: usize,
    missed: usize,
    /// No program at all.
    unviable: usize,
}

impl AddAssign for Outcomes {
    fn add_assign(&mut self, other: Self) {
        self.caught += other.caught;
        self.timeout += other.timeout;
        self.missed += other.missed;
        self.unviable += other.unviable;
    }
}

impl Outcomes {
    fn tested(self) -> usize {
        self.caught + self.timeout + self.missed
    }

    /// Rounded down.
    fn percent(self) -> usize {
        (self.caught + self.timeout) * 100 / self.tested().max(1)
    }

    fn line(self, what: &str) -> String {
        format!(
            "{what}: {} mutants, {} caught ({} %), {} missed",
            self.tested(),
            self.caught + self.timeout,
            self.percent(),
            self.missed
        )
    }
}

impl Mutants {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let Some(tool) = TOOL.ensure(sh, self.install, "mutants")? else {
            bail!("nothing was tested");
        };
        let (mut all, mut below) = (Outcomes::default(), Vec::new());
        let wanted =
            |name: &&str| self.only.is_empty() || self.only.iter().any(|only| only == name);
        let crates: Vec<_> = CRATES.into_iter().filter(wanted).collect();
        for &name in &crates {
            let outcomes = self.of(sh, &tool, name)?;
            println!("{}", outcomes.line(name));
            if outcomes.percent() < GOAL {
                below.push(name);
            }
            all += outcomes;
        }
        let how = format!("part {} of {}", self.shard, crates.join(", "));
        self.record
            .conclude(sh, "cargo xtask mutants", &all.line("all"), &how)?;
        ensure!(all.tested() > 0, "no mutant was tested");
        ensure!(
            below.is_empty(),
            "less than {GOAL} % were caught of {}",
            below.join(", ")
        );
        Ok(())
    }

    fn of(&self, sh: &Shell, tool: &Path, name: &str) -> anyhow::Result<Outcomes> {
        let out = sh.current_dir().join("target/mutants").join(name);
        sh.create_dir(&out)?;
        let shard = &self.shard;
        // Exit codes other than 0 tell of mutants that were missed, or of what went wrong: the outcomes know better.
        cmd!(
            sh,
            "{tool} mutants --package {name} --shard {shard} --sharding round-robin --output {out}"
        )
        .ignore_status()
        .run()?;
        let path = out.join("mutants.out/outcomes.json");
        let failed = || format!("cargo-mutants left no outcomes in {}", path.display());
        let file = File::open(&path).with_context(failed)?;
        serde_json::from_reader(BufReader::new(file)).with_context(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_end_is_caught_and_what_is_no_program_does_not_count() {
        let json = r#"{"caught": 88, "timeout": 1, "missed": 10, "unviable": 7, "success": 0, "outcomes": []}"#;
        let outcomes: Outcomes = serde_json::from_str(json).expect("as it is written");
        assert_eq!(
            outcomes.line("some"),
            "some: 99 mutants, 89 caught (89 %), 10 missed"
        );
    }

    #[test]
    fn no_mutants_are_none_caught() {
        assert_eq!(Outcomes::default().percent(), 0);
    }
}
