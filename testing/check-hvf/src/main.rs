//! Executes the macOS code of `hvf-backend` on Linux, over `testing/fake-hvf`.
//!
//! Run it by `cargo xtask fake-hvf`.

mod coverage;
mod wrapper;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use harness::packages::{Install, Package};
use serde_json::Value;
use xshell::{Shell, cmd};

use coverage::Coverage;

/// The emulator of `fake-hvf`, the assembler of the demo's guest, and the tools that read what
/// instrumented code has counted, in the version of the compiler's own LLVM.
const PACKAGES: [Package; 3] = [
    Package::new("libunicorn-dev", "/usr/include/unicorn/unicorn.h"),
    Package::new("llvm", "llvm-mc"),
    Package::new("llvm-22", coverage::COV),
];

/// The variable with which the fake denies a process, `control::NOT_ENTITLED` of `fake-hvf`.
const NOT_ENTITLED: &str = "FAKE_HVF_NOT_ENTITLED";

/// Apart from other builds, which are made without `--cfg hvf_fake`.
const TARGET_DIR: &str = "target/fake-hvf";

/// The option that makes cargo name what it builds.
const JSON: &str = "--message-format=json-render-diagnostics";

/// Run hvf-backend's tests, examples and demo over a fake of Apple's Hypervisor framework
///
/// The code for macOS is compiled for Linux (`--cfg hvf_fake`) and linked with `testing/fake-hvf`,
/// which runs arm64 guests in the emulator Unicorn. Runs the tests of the fake itself, those of
/// hvf-backend with its fewest and its most features, live snapshots of such guests, the examples
/// of hvf-backend, among them the self-test for Macs, and the demo with its guest of the framework.
/// Then it prints how many lines of crates/hvf-backend/src/macos were executed, and which were not.
/// Less than 90 % are an error.
///
/// It needs Linux on x86-64, and Debian's packages libunicorn-dev, llvm and llvm-22, which it
/// installs as root.
#[derive(Parser)]
#[command(name = "cargo xtask fake-hvf", bin_name = "cargo xtask fake-hvf")]
struct FakeHvf {
    #[command(flatten)]
    install: Install,
    /// Omit the tests with the fewest features
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    if let Some(code) = wrapper::as_compiler() {
        return code;
    }
    let task = FakeHvf::parse();
    harness::run(|sh| task.run(sh))
}

impl FakeHvf {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if cfg!(not(all(target_os = "linux", target_arch = "x86_64"))) {
            return unavailable("it runs on Linux on x86-64 only");
        }
        if !self.install.ensure(sh, &PACKAGES, "fake-hvf")?.is_empty() {
            return unavailable("the packages that it needs are not installed");
        }
        let dir = sh.current_dir().join(TARGET_DIR);
        let coverage = Coverage::begin(sh, &dir)?;
        let _wrapper = wrapper::push(sh)?;
        let _env = [
            sh.push_env("CARGO_TARGET_DIR", &dir),
            sh.push_env(
                "CARGO_ENCODED_RUSTFLAGS",
                "--cfg\u{1f}hvf_fake\u{1f}-Dwarnings",
            ),
            // Nothing is debugged, and a clean build is faster without these.
            sh.push_env("CARGO_INCREMENTAL", "0"),
            sh.push_env("CARGO_PROFILE_DEV_DEBUG", "0"),
            coverage.push_env(sh),
        ];
        let programs = self.run_all(sh)?;
        coverage.report(sh, &programs)
    }

    /// Builds and runs everything. Returns the programs.
    fn run_all(&self, sh: &Shell) -> anyhow::Result<BTreeSet<PathBuf>> {
        let backend = tests(sh, "crates/hvf-backend")?;
        let fake = tests(sh, "testing/fake-hvf")?;
        let live = ["--test", "hvf"].map(String::from).to_vec();
        // All builds select `demo` or `adaptive`: with either, cargo selects the same features of
        // all dependencies, and builds each once. `adaptive` selects no feature of hvf-backend.
        let backend_only = ["-p", "ramsnap-hvf-backend", "-p", "adaptive"];
        let all = [
            "-p",
            "ramsnap-hvf-backend",
            "-p",
            "fake-hvf",
            "-p",
            "ramsnap-live-snapshot",
            "-p",
            "demo",
            "--all-features",
        ];
        let mut programs = BTreeSet::new();
        // The fewest features first: without `macos-15`, another module replaces that of the
        // interrupt controller.
        let passes = [
            (&backend_only[..], backend.clone()),
            (&all[..], [backend, fake, live].concat()),
        ];
        for (packages, tests) in passes.into_iter().skip(usize::from(self.quick)) {
            let tests = &tests;
            let build = cmd!(sh, "cargo test --locked {packages...} --lib {tests...}");
            let built = build.args(["--no-run", JSON]).read()?;
            programs.extend(executables(&built)?);
            let test = cmd!(sh, "cargo test --locked {packages...} --lib {tests...}");
            test.arg("--no-fail-fast").run()?;
        }
        let built = cmd!(
            sh,
            "cargo build --locked {all...} --bin demo --examples {JSON}"
        );
        let built = executables(&built.read()?)?;
        let program = |name: &str| {
            let found = built.iter().find(|path| path.ends_with(name));
            found.with_context(|| format!("cargo built no program {name}"))
        };
        let dir = tempfile::tempdir()?;
        let dir = dir.path();
        for example in ["snapshot", "resume", "own_memory"] {
            let example = program(example)?;
            cmd!(sh, "{example} {dir}").run()?;
        }
        selftest(sh, program("selftest")?)?;
        let demo = program("demo")?;
        cmd!(sh, "{demo} --guest hvf --ram 64M --rounds 2").run()?;
        programs.extend(built);
        Ok(programs)
    }
}

/// Reports that nothing is run. An error unless this is a step.
fn unavailable(why: &str) -> anyhow::Result<()> {
    if harness::is_step() {
        return harness::leave_out("fake-hvf", why);
    }
    bail!("nothing can be run over fake-hvf: {why}")
}

/// Runs the self-test for Macs: every step passes, and steps that fail do not end the others.
fn selftest(sh: &Shell, program: &Path) -> anyhow::Result<()> {
    let run = || cmd!(sh, "{program} --json");
    let report = run().read()?;
    let steps = steps(&report)?;
    let passed = |step: &&(String, String)| step.1 == "pass";
    ensure!(!steps.is_empty(), "the self-test has no steps");
    for (name, status) in &steps {
        ensure!(
            status == "pass",
            "the step {name} of the self-test: {status}\n{report}"
        );
    }
    let denied = run().env(NOT_ENTITLED, "1").ignore_status().output()?;
    ensure!(
        denied.status.code() == Some(1),
        "the self-test did not fail: {denied:?}"
    );
    let denied = self::steps(std::str::from_utf8(&denied.stdout)?)?;
    ensure!(denied.len() == steps.len(), "a step is missing: {denied:?}");
    // Those of the file system need no entitlement.
    let still = denied.iter().filter(passed).count();
    ensure!(
        (1..steps.len()).contains(&still),
        "{still} steps passed: {denied:?}"
    );
    println!("selftest: {} steps passed", steps.len());
    Ok(())
}

/// Returns the name and the status of each step of the self-test's report.
fn steps(report: &str) -> anyhow::Result<Vec<(String, String)>> {
    let report: Value = serde_json::from_str(report)?;
    let steps = report["steps"].as_array().context("a report has steps")?;
    let text = |step: &Value, key| -> anyhow::Result<String> {
        let text = step[key].as_str();
        Ok(text
            .with_context(|| format!("a step has a {key}"))?
            .to_owned())
    };
    let steps = steps
        .iter()
        .map(|step| Ok((text(step, "name")?, text(step, "status")?)));
    steps.collect()
}

/// Returns the options of `cargo test` that select the test files of a crate.
fn tests(sh: &Shell, krate: &str) -> anyhow::Result<Vec<String>> {
    let mut options = Vec::new();
    for file in sh.read_dir(format!("{krate}/tests"))? {
        if file.extension().is_some_and(|extension| extension == "rs") {
            let name = file.file_stem().unwrap_or_default();
            options.extend(["--test".into(), name.to_string_lossy().into_owned()]);
        }
    }
    Ok(options)
}

/// Returns the programs that cargo's JSON messages name.
fn executables(messages: &str) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut programs = BTreeSet::new();
    for message in messages.lines() {
        let message: Value = serde_json::from_str(message)?;
        programs.extend(message["executable"].as_str().map(PathBuf::from));
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_by_name_and_status() {
        let report = r#"{"steps":[{"name":"sme","status":"pass","reason":null}]}"#;
        let expected = [("sme".to_owned(), "pass".to_owned())];
        assert_eq!(steps(report).expect("a report"), expected);
        steps(r#"{"steps":[{"name":"sme"}]}"#).expect_err("no status");
        steps("{}").expect_err("no steps");
    }

    #[test]
    fn executables_are_those_of_the_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":\"/t/deps/a-1\"}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"build-finished\"}\n";
        let programs = executables(messages).expect("JSON");
        assert_eq!(programs, BTreeSet::from([PathBuf::from("/t/deps/a-1")]));
    }
}
