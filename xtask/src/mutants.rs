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

/// The crates that a lost page would be lost in, each with the test files that take a moment: most mutants are noticed there, and only those
/// that are not have all tests run.
const CRATES: [(&str, &[&str]); 4] = [
    (
        "atomic-file",
        &["group", "power_loss", "recycling", "replace"],
    ),
    ("dirty-bitmap", &[]),
    (
        "memory-writer",
        &["bad_input", "oracle", "process", "snapshots"],
    ),
    ("memory-image", &["chains", "lazy_kvm", "mapped_chain"]),
];

/// Of a hundred mutants, so many are to be caught.
const GOAL: usize = 90;

/// Change the code in small ways, one at a time, and see the tests notice
///
/// cargo-mutants makes the changes, in a copy of the workspace; each is tested by the tests of its own crate. .cargo/mutants.toml tells which changes are not
/// made, each with the reason why no test could notice. Exit code 0 says that of every crate 90 % were noticed at least; those that were not
/// are listed, in target/mutants. All of them take hours: --shard 0/20 takes one twentieth, of every file some.
#[derive(clap::Args)]
pub struct Mutants {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only these crates, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "CRATE", value_parser = CRATES.map(|(name, _)| name))]
    only: Vec<String>,
    /// The K-th of N parts of the mutants, from 0 on
    #[arg(long, value_name = "K/N", default_value = "0/1")]
    shard: String,
    /// Try so many at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
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

    fn line(self) -> String {
        format!(
            "{} mutants, {} caught ({} %), {} missed",
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
        let crates: Vec<_> = CRATES
            .into_iter()
            .filter(|(name, _)| wanted(name))
            .collect();
        for (name, quick) in crates {
            let outcomes = self.of(sh, &tool, name, quick)?;
            self.record.conclude(
                sh,
                &format!("cargo xtask mutants --only {name}"),
                &outcomes.line(),
                &format!("part {}", self.shard),
            )?;
            if outcomes.percent() < GOAL {
                below.push(name);
            }
            all += outcomes;
        }
        ensure!(all.tested() > 0, "no mutant was tested");
        ensure!(
            below.is_empty(),
            "less than {GOAL} % were caught of {}",
            below.join(", ")
        );
        Ok(())
    }

    fn of(&self, sh: &Shell, tool: &Path, name: &str, quick: &[&str]) -> anyhow::Result<Outcomes> {
        let shard = ["--shard", &self.shard, "--sharding", "round-robin"].map(str::to_owned);
        if quick.is_empty() {
            return Ok(self.pass(sh, tool, name, &shard, &["--tests"])?.0);
        }
        let targets: Vec<_> = quick.iter().flat_map(|test| ["--test", test]).collect();
        let (mut outcomes, missed) = self.pass(sh, tool, name, &shard, &targets)?;
        if missed.is_empty() {
            return Ok(outcomes);
        }
        let those = ["--re".into(), any_of(&missed)];
        let (rest, _) = self.pass(sh, tool, name, &those, &["--tests"])?;
        ensure!(
            rest.tested() + rest.unviable == missed.len(),
            "{} mutants were missed at first, and {} tried again",
            missed.len(),
            rest.tested()
        );
        outcomes.missed = 0;
        outcomes += rest;
        Ok(outcomes)
    }

    /// Tries `mutants` with the unit tests and those of `targets`: what became of them, and the names of those that nothing noticed.
    fn pass(
        &self,
        sh: &Shell,
        tool: &Path,
        name: &str,
        mutants: &[String],
        targets: &[&str],
    ) -> anyhow::Result<(Outcomes, Vec<String>)> {
        let out = sh.current_dir().join("target/mutants").join(name);
        sh.create_dir(&out)?;
        let jobs = self.jobs.to_string();
        // Not the documentation's examples: linking them takes longer than all other tests.
        // Exit codes other than 0 tell of mutants that were missed, or of what went wrong: the outcomes know better.
        cmd!(
            sh,
            "{tool} mutants --package {name} --jobs {jobs} {mutants...} --output {out} -- --lib {targets...}"
        )
        .ignore_status()
        .run()?;
        let out = out.join("mutants.out");
        let path = out.join("outcomes.json");
        let failed = || format!("cargo-mutants left no outcomes in {}", path.display());
        let file = File::open(&path).with_context(failed)?;
        let outcomes = serde_json::from_reader(BufReader::new(file)).with_context(failed)?;
        let missed = sh.read_file(out.join("missed.txt"))?;
        Ok((outcomes, missed.lines().map(str::to_owned).collect()))
    }
}

/// A regular expression for these names and no others.
fn any_of(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| regex::escape(name)).collect();
    format!("^(?:{})$", names.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_end_is_caught_and_what_is_no_program_does_not_count() {
        let json = r#"{"caught": 88, "timeout": 1, "missed": 10, "unviable": 7, "success": 0, "outcomes": []}"#;
        let outcomes: Outcomes = serde_json::from_str(json).expect("as it is written");
        assert_eq!(outcomes.line(), "99 mutants, 89 caught (89 %), 10 missed");
    }

    #[test]
    fn no_mutants_are_none_caught() {
        assert_eq!(Outcomes::default().percent(), 0);
    }
}
