//! Makes small changes to the code, and checks that the tests detect them.
//!
//! Run it by `cargo xtask mutants`.

mod crates;
mod results;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, ensure};
use clap::Parser;
use harness::cargo_tool::CargoTool;
use harness::packages::{Install, Package};
use harness::record::Record;
use xshell::{Shell, cmd};

use crates::{CRATES, Mutated, crates};
use results::{Outcomes, Results};

const TOOL: CargoTool = CargoTool {
    name: "cargo-mutants",
    version: "27.1.0",
    wheel: None,
};

/// The emulator of `testing/fake-hvf`.
const UNICORN: [Package; 1] = [Package::new(
    "libunicorn-dev",
    "/usr/include/unicorn/unicorn.h",
)];

/// The default shard: all mutants.
const ALL: &str = "0/1";

/// Make small changes to the code, one at a time, and check that the tests detect them
///
/// cargo-mutants makes the changes in a copy of the workspace. Each is tested by the tests of its
/// own crate. The modules of hvf-backend for macOS are tested over testing/fake-hvf, which needs
/// Debian's package libunicorn-dev. .cargo/mutants.toml lists the changes that are not made, each
/// with the reason why no test can detect it. Exit code 0 means that at least 90 % were detected in
/// every crate, and 85 % of hvf-backend. The others are listed in target/mutants. All changes take
/// hours: --shard 0/20 makes one twentieth, with some of every file.
#[derive(Parser)]
#[command(name = "cargo xtask mutants", bin_name = "cargo xtask mutants")]
struct Mutants {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only these crates, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "CRATE", value_parser = crates())]
    only: Vec<String>,
    /// Those of these crates that are mutated, for `cargo xtask prove --changed`
    #[arg(long, hide = true, value_delimiter = ',', conflicts_with = "only")]
    changed: Vec<String>,
    /// The K-th of N parts of the mutants, from 0 on
    #[arg(long, value_name = "K/N", default_value = ALL)]
    shard: String,
    /// The number of mutants that are tested concurrently
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
}

fn main() -> ExitCode {
    let mutants = Mutants::parse();
    harness::run(|sh| mutants.run(sh))
}

impl Mutants {
    fn run(mut self, sh: &Shell) -> anyhow::Result<()> {
        if !harness::changed::limit(&mut self.only, &self.changed, &crates(), "mutants") {
            return Ok(());
        }
        let Some(tool) = TOOL.ensure(sh, self.install, "mutants")? else {
            bail!("nothing was tested");
        };
        let (mut all, mut below) = (Outcomes::default(), Vec::new());
        let wanted = |mutated: &Mutated| {
            self.only.is_empty() || self.only.iter().any(|only| only == mutated.name)
        };
        let shard = match self.shard.as_str() {
            ALL => "all".into(),
            shard => format!("part {shard}"),
        };
        for mutated in CRATES.into_iter().filter(wanted) {
            let name = mutated.name;
            if mutated.over_fake_hvf && !self.can_run_over_fake_hvf(sh)? {
                harness::leave_out(&format!("mutants of {name}"), "they need libunicorn-dev")?;
                continue;
            }
            let outcomes = self.of(sh, &tool, &mutated)?;
            self.record.conclude(
                sh,
                &format!("cargo xtask mutants --only {name}"),
                &outcomes.line(),
                &shard,
            )?;
            if outcomes.percent() < mutated.goal {
                below.push(format!("{} % of {name}", mutated.goal));
            }
            all += outcomes;
        }
        ensure!(all.tested() > 0, "no mutant was tested");
        ensure!(
            below.is_empty(),
            "too few were caught: less than {}",
            below.join(", ")
        );
        Ok(())
    }

    fn can_run_over_fake_hvf(&self, sh: &Shell) -> anyhow::Result<bool> {
        let is_linux = cfg!(all(target_os = "linux", target_arch = "x86_64"));
        Ok(is_linux && self.install.ensure(sh, &UNICORN, "mutants")?.is_empty())
    }

    fn of(&self, sh: &Shell, tool: &Path, mutated: &Mutated) -> anyhow::Result<Outcomes> {
        let shard = ["--shard", &self.shard, "--sharding", "round-robin"];
        let mut mutants = shard.map(str::to_owned).to_vec();
        let _flags = mutated
            .over_fake_hvf
            .then(|| sh.push_env("CARGO_ENCODED_RUSTFLAGS", "--cfg\u{1f}hvf_fake"));
        let mut targets = vec!["--lib"];
        let mut all = Outcomes::default();
        let mut missed: Option<Vec<String>> = None;
        for files in mutated.tiers {
            targets.extend(files.iter().flat_map(|file| ["--test", file]));
            let results = self.pass(sh, tool, mutated, &mutants, &targets)?;
            let (outcomes, still_missed) = results.of(missed.as_deref());
            let again = std::mem::take(&mut all.missed);
            ensure!(
                again == 0 || again == outcomes.tested() + outcomes.unviable,
                "{again} mutants were missed at first, and {} tried again",
                outcomes.tested()
            );
            all += outcomes;
            if still_missed.is_empty() {
                break;
            }
            mutants = vec!["--re".into(), any_of(&still_missed)];
            missed = Some(still_missed);
            targets.clear();
        }
        Ok(all)
    }

    /// Tests `mutants` with the tests of `targets`. Returns their names by result.
    fn pass(
        &self,
        sh: &Shell,
        tool: &Path,
        mutated: &Mutated,
        mutants: &[String],
        targets: &[&str],
    ) -> anyhow::Result<Results> {
        let Mutated { name, files, .. } = mutated;
        let files = files.iter().flat_map(|files| ["--file", files]);
        let out = sh.current_dir().join("target/mutants").join(name);
        sh.create_dir(&out)?;
        let jobs = self.jobs.to_string();
        // That a case fails is enough: it need not be a small one.
        let _first_failure = sh.push_env("PROPTEST_MAX_SHRINK_ITERS", "0");
        // What is not run is not built either: linking takes longer than most tests, and the
        // documentation's examples longest of all.
        let targets: Vec<_> = targets
            .iter()
            .map(|it| format!("--cargo-arg={it}"))
            .collect();
        // Exit codes other than 0 tell of mutants that were missed, or of what went wrong: the
        // outcomes know better.
        cmd!(
            sh,
            "{tool} mutants --package ramsnap-{name} --jobs {jobs} {files...} {mutants...} --output {out} {targets...}"
        )
        .ignore_status()
        .run()?;
        let out = out.join("mutants.out");
        Results::read(sh, &out)
    }
}

/// Returns a regular expression that matches these names and no others.
fn any_of(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| regex::escape(name)).collect();
    format!("^(?:{})$", names.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutants_with_punctuation_are_selected_by_name() {
        let names = [
            "a.rs:1:2: replace < with > in <A<'_> as B>::c",
            "a.rs:3:4: replace || with &&",
        ];
        let expression = any_of(&names.map(str::to_owned));
        let expression = regex::Regex::new(&expression).expect("an expression");
        for name in names {
            assert!(expression.is_match(name), "{name}");
        }
        assert!(!expression.is_match("a.rs:1:2: replace < with > in <A<'_> as B>::d"));
    }
}
