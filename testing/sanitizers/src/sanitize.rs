//! The tests once more, with every access to memory watched.

mod sanitizer;
mod skipped;

use std::time::Instant;

use anyhow::{bail, ensure};
use clap::Parser;
use harness::debian_rust;
use harness::packages::{Install, Package};
use harness::record::Record;
use test_machine::not_run;
use xshell::Shell;

use sanitizer::{Mutant, Sanitizer};
use skipped::{LEFT_OUT, SKIPPED};

/// What names the functions of a report, and the sanitizer's own library with a linker that knows
/// it.
const PACKAGES: [Package; 3] = [
    Package::new("llvm-22", "llvm-symbolizer-22"),
    Package::new("clang-22", "clang-22"),
    Package::new(
        "libclang-rt-22-dev",
        "/usr/lib/llvm-22/lib/clang/22/lib/linux/libclang_rt.tsan-x86_64.a",
    ),
];

/// Everything that a crate tests.
const ALL: &[&str] = &["--lib", "--tests"];

/// The crates whose tests are run, and which of them: [`LEFT_OUT`] says why not all.
const CRATES: [(&str, &[&str]); 11] = [
    (
        "atomic-file",
        &[
            "--lib",
            "--test",
            "group",
            "--test",
            "recycling",
            "--test",
            "replace",
        ],
    ),
    ("dirty-bitmap", ALL),
    ("host-memory", ALL),
    ("sparse-file", ALL),
    ("memory-writer", ALL),
    (
        "page-reader",
        &["--lib", "--test", "conformance", "--test", "layout"],
    ),
    ("guest-ram", ALL),
    ("image-format", ALL),
    ("memory-image", ALL),
    ("lazy-restore", ALL),
    ("hvf-backend", &["--lib", "--test", "exits"]),
];

/// Returns the names of the crates whose tests are run.
fn crates() -> [&'static str; 11] {
    CRATES.map(|(name, _)| name)
}

/// Run the tests under sanitizers that detect data races, use after free and out-of-bounds accesses
///
/// Builds the crates with ThreadSanitizer (and the standard library, whose locks it must see) or
/// AddressSanitizer, and runs their tests. First it shows that mutants are detected. Tests that a
/// sanitizer cannot follow are not run; they are listed with the reason. Linux on x86-64.
///
/// It takes Debian's packages of a Rust toolchain with the standard library's source, and of clang
/// and LLVM, which it installs as root.
#[derive(Parser)]
#[command(name = "cargo xtask sanitize", bin_name = "cargo xtask sanitize")]
pub(crate) struct Sanitize {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    /// Only this sanitizer
    #[arg(value_enum)]
    sanitizer: Option<Sanitizer>,
    /// Only the tests of these crates, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "CRATE", value_parser = crates())]
    only: Vec<String>,
    /// Those of these crates that are tested here, for `cargo xtask prove --changed`
    #[arg(long, hide = true, value_delimiter = ',', conflicts_with = "only")]
    changed: Vec<String>,
}

/// The result of the tests of a crate.
#[derive(Default)]
struct Sum {
    tests: u64,
    reports: usize,
}

impl Sanitize {
    pub(crate) fn run(mut self, sh: &Shell) -> anyhow::Result<()> {
        if !harness::changed::limit(&mut self.only, &self.changed, &crates(), "sanitize") {
            return Ok(());
        }
        let mut missing = self
            .install
            .ensure(sh, &debian_rust::PACKAGES, "sanitize")?;
        missing.extend(self.install.ensure(sh, &PACKAGES, "sanitize")?);
        ensure!(missing.is_empty(), "nothing can be built with a sanitizer");
        for (what, why) in LEFT_OUT {
            not_run(what, why);
        }
        let all = [Sanitizer::Thread, Sanitizer::Address];
        let mut closing = Vec::new();
        for sanitizer in all {
            if self.sanitizer.is_none_or(|only| only == sanitizer) {
                closing.push(self.run_with(sh, sanitizer)?);
            }
        }
        let of = match self.only.as_slice() {
            [] => "all of it".into(),
            crates => crates.join(", "),
        };
        let said = closing.join("; ");
        self.record.conclude(sh, "cargo xtask sanitize", &said, &of)
    }

    fn run_with(&self, sh: &Shell, sanitizer: Sanitizer) -> anyhow::Result<String> {
        let start = Instant::now();
        let name = sanitizer.name();
        let _env = sanitizer.env(sh);
        for mutant in sanitizer.mutants() {
            find(sh, sanitizer, mutant)?;
        }
        let mut all = Sum::default();
        for (name, targets) in CRATES {
            if !self.only.is_empty() && !self.only.iter().any(|only| only == name) {
                continue;
            }
            let start = Instant::now();
            let sum = test(sh, sanitizer, name, targets)?;
            let Sum { tests, reports } = sum;
            let time = start.elapsed().as_secs();
            println!("{name}: {tests} tests, {reports} reports ({time} s)");
            all.tests += tests;
            all.reports += reports;
        }
        let (tests, reports) = (all.tests, all.reports);
        ensure!(reports == 0, "{reports} reports, printed above");
        ensure!(tests > 0, "no test was run");
        let found: Vec<_> = sanitizer
            .mutants()
            .iter()
            .map(|mutant| mutant.name)
            .collect();
        Ok(format!(
            "{name}: {tests} tests, {reports} reports; mutants found: {} ({} s)",
            found.join(", "),
            start.elapsed().as_secs(),
        ))
    }
}

/// Runs a mutant, which must be detected.
fn find(sh: &Shell, sanitizer: Sanitizer, mutant: &Mutant) -> anyhow::Result<()> {
    let name = mutant.name;
    let made = sanitizer
        .cargo(sh, "run")
        .args([
            "--package",
            "test-machine",
            "--example",
            "memory_mutants",
            "--",
        ])
        .arg(name)
        .ignore_status()
        .output()?;
    let said = String::from_utf8_lossy(&made.stderr);
    if !said.contains(mutant.found_as) {
        bail!("the mutant {name} is not detected\n{said}");
    }
    println!("found: {name}");
    Ok(())
}

/// Runs the tests of one crate.
fn test(sh: &Shell, sanitizer: Sanitizer, name: &str, targets: &[&str]) -> anyhow::Result<Sum> {
    let skipped = || {
        let skipped = SKIPPED.iter();
        skipped.filter(move |skipped| {
            skipped.of == name && skipped.sanitizer.is_none_or(|by| by == sanitizer)
        })
    };
    for skipped in skipped() {
        not_run(skipped.test, skipped.why);
    }
    let skips = skipped().flat_map(|skipped| ["--skip", skipped.test]);
    let output = sanitizer
        .cargo(sh, "test")
        .args(["--package", &format!("ramsnap-{name}"), "--all-features"])
        .args(targets)
        .args(["--no-fail-fast", "--"])
        .args(skips)
        .ignore_status()
        .output()?;
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    let tests = said[0].lines().filter_map(|line| {
        let (_, counts) = line.split_once("test result: ")?;
        let (passed, _) = counts.split_once(" passed")?;
        passed.rsplit(' ').next()?.parse::<u64>().ok()
    });
    let tests = tests.sum();
    let said = said.concat();
    let reports = said.matches(sanitizer.report()).count();
    if reports > 0 || !output.status.success() {
        println!("{said}");
    }
    ensure!(
        reports > 0 || output.status.success(),
        "the tests of {name} fail, without a report"
    );
    Ok(Sum { tests, reports })
}
