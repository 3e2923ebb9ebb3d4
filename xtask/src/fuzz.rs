//! `cargo xtask fuzz`: feed the readers inputs from libFuzzer.

use std::path::Path;

use anyhow::{Context, bail};
use harness::packages::{Install, Package};
use harness::record::Record;
use indicatif::HumanCount;
use xshell::{Shell, cmd};

const PACKAGES: [Package; 1] = [Package::new("g++", "g++")];

/// The flags of cargo-fuzz for rustc: coverage of edges and comparisons, and AddressSanitizer.
const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Naming the target keeps the flags from build scripts, which the sanitizer would stop.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Feed footers, chains, dirty logs, bitmaps, RAM layouts and vCPU states with libFuzzer's inputs
///
/// Starts with the inputs in fuzz/corpus, and writes new ones to target/fuzz/corpus. An input that
/// breaks a target is kept in target/fuzz, and its path is printed. Linux on x86-64.
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only these targets
    targets: Vec<String>,
    /// The duration of each target
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u64,
    /// The number of new inputs of each target, instead of a duration
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    runs: Option<u64>,
    /// The seed of the new inputs [default: a random one]
    #[arg(long)]
    seed: Option<u32>,
    /// Optimize less: halves the build time and the speed
    #[arg(long)]
    quick_build: bool,
    /// Add the found inputs to fuzz/corpus, as few as cover the same code
    #[arg(long)]
    keep: bool,
}

impl Fuzz {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        self.install.ensure(sh, &PACKAGES, "libFuzzer")?;
        let manifest = "fuzz/Cargo.toml";
        {
            // The sanitizer is in every toolchain; the flag for it is not stable.
            let _bootstrap = sh.push_env("RUSTC_BOOTSTRAP", "1");
            let _flags = sh.push_env("RUSTFLAGS", FLAGS);
            let quick = [
                ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1"),
                ("CARGO_PROFILE_RELEASE_DEBUG", "none"),
            ];
            let quick = quick.into_iter().filter(|_| self.quick_build);
            let _quick: Vec<_> = quick
                .map(|(name, value)| sh.push_env(name, value))
                .collect();
            cmd!(
                sh,
                "cargo build --locked --release --manifest-path {manifest} --target {TARGET} --target-dir target/fuzz"
            )
            .run()?;
        }
        let mut targets = names(sh)?;
        if let Some(unknown) = self.targets.iter().find(|name| !targets.contains(name)) {
            bail!(
                "no target is called {unknown}; there are: {}",
                targets.join(", ")
            );
        }
        if !self.targets.is_empty() {
            targets = self.targets.clone();
        }
        let mut inputs = 0;
        for name in &targets {
            inputs += self.fuzz(sh, name)?;
        }
        let said = format!(
            "{} inputs in {} targets, nothing found",
            HumanCount(inputs),
            targets.len()
        );
        let how = match self.runs {
            Some(runs) => format!("{} new inputs each", HumanCount(runs)),
            None => format!("{} s each", self.seconds),
        };
        self.record.conclude(sh, "cargo xtask fuzz", &said, &how)
    }

    /// The number of inputs that were run.
    fn fuzz(&self, sh: &Shell, name: &str) -> anyhow::Result<u64> {
        let program = format!("target/fuzz/{TARGET}/release/{name}");
        let kept = format!("fuzz/corpus/{name}");
        let found = match self.seed {
            Some(_) => format!("target/fuzz/seeded/{name}"),
            None => format!("target/fuzz/corpus/{name}"),
        };
        if self.seed.is_some() {
            // What an earlier run found would change what this one tries.
            sh.remove_path(&found)?;
        }
        sh.create_dir(&found)?;
        sh.create_dir(&kept)?;
        let limit = match self.runs {
            Some(runs) => format!("-runs={runs}"),
            None => format!("-max_total_time={}", self.seconds),
        };
        // Zero has libFuzzer choose a seed.
        let seed = format!("-seed={}", self.seed.unwrap_or(0));
        let broken = format!("-artifact_prefix=target/fuzz/{name}-");
        let output = cmd!(
            sh,
            "{program} {found} {kept} {limit} {seed} {broken} -max_len=8192 -rss_limit_mb=1024 -timeout=120 -print_final_stats=1"
        )
        .ignore_status()
        .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("{name} failed; its input is named below\n{said}");
        }
        let runs = said
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
            .context("libFuzzer did not report the number of inputs")?;
        let runs: u64 = runs
            .trim()
            .parse()
            .context("libFuzzer reported an invalid number of inputs")?;
        println!("{name}: {} inputs, nothing found", HumanCount(runs));
        if self.keep {
            let merged = format!("target/fuzz/merged-{name}");
            sh.remove_path(&merged)?;
            sh.create_dir(&merged)?;
            cmd!(
                sh,
                "{program} -merge=1 -max_len=8192 {merged} {kept} {found}"
            )
            .quiet()
            .ignore_stderr()
            .run()?;
            sh.remove_path(&kept)?;
            sh.create_dir(&kept)?;
            for input in sh.read_dir(&merged)? {
                let file = input.file_name().context("an input has a name")?;
                sh.copy_file(&input, Path::new(&kept).join(file))?;
            }
        }
        Ok(runs)
    }
}

/// The targets, by their files.
fn names(sh: &Shell) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for path in sh.read_dir("fuzz/targets")? {
        let stem = path.file_stem().context("a target has a name")?;
        names.push(stem.to_string_lossy().replace('_', "-"));
    }
    Ok(names)
}
