//! What a suite and its steps are, and how they are run.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use harness::interrupt::Interrupt;
use harness::packages::Install;
use harness::process::this_program;
use test_machine::{Need, REQUIRE};
use xshell::{Cmd, Shell, cmd};

use super::durations::Durations;
use super::left_out::LeftOut;
use crate::program::cargo_arguments;

/// One of the three commands that run steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Suite {
    /// As in `cargo xtask NAME`.
    pub name: &'static str,
    pub steps: &'static [Step],
}

/// A part of a suite that is run, timed and reported by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub name: &'static str,
    /// The claim that a pass supports, for docs/testing.md.
    pub proves: &'static str,
    /// Files and directories whose change calls for this step in `prove --changed`.
    pub paths: &'static [&'static str],
    pub run: fn(&Context<'_>) -> anyhow::Result<()>,
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Step {}

/// The times of the steps that were run, if they are to be recorded.
pub(crate) struct Times {
    /// The name of the suite.
    pub suite: &'static str,
    /// Each step, and how long it took.
    pub seconds: Vec<(&'static str, u64)>,
}

/// Options of all three commands.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// Only these steps [default: all]
    #[arg(value_name = "STEP")]
    steps: Vec<String>,
    /// List the steps and the claim that each tests, and run nothing
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    install: Install,
    /// Write the time of each step that was run to docs/testing.md
    #[arg(long)]
    record: bool,
}

/// The context of a step.
pub(crate) struct Context<'a> {
    pub sh: &'a Shell,
    pub install: Install,
    /// `CI=true` is set: what this machine lacks is an error.
    pub ci: bool,
    /// Figures go into the pages under docs/.
    pub record: bool,
    /// The crates to which a step that can be limited to some is limited; all where it is empty.
    pub crates: Vec<String>,
    left_out: LeftOut,
    /// This program, for steps that are tasks by themselves.
    program: PathBuf,
}

impl Context<'_> {
    /// Returns the command `cargo xtask ARGUMENTS`.
    pub(crate) fn xtask(&self, arguments: &str) -> Cmd<'_> {
        println!("$ cargo xtask {arguments}");
        let (sh, program) = (self.sh, &self.program);
        cmd!(sh, "{program}").args(arguments.split(' ')).quiet()
    }

    /// Builds and runs a program under `testing/` that is no task by itself.
    pub(crate) fn program(&self, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let (sh, cargo_arguments) = (self.sh, cargo_arguments(name)?);
        Ok(cmd!(sh, "cargo {cargo_arguments...} {arguments...}")
            .quiet()
            .run()?)
    }

    /// Reports that `what` is not run. An error in CI.
    pub(crate) fn leave_out(&self, what: &str, why: &str) -> anyhow::Result<()> {
        ensure!(!self.ci, "{what} was not run: {why}");
        println!("NOT RUN {what}: {why}");
        self.left_out.add(what, why)
    }

    /// Returns whether this machine has `need`, and reports that `what` is not run where it has
    /// not.
    pub(crate) fn has(&self, need: Need, what: &str) -> anyhow::Result<bool> {
        if need.is_met() {
            return Ok(true);
        }
        self.leave_out(what, &format!("this machine has no {need}"))?;
        Ok(false)
    }
}

impl Suite {
    pub(super) fn step(&self, name: &str) -> anyhow::Result<&'static Step> {
        let found = self.steps.iter().find(|step| step.name == name);
        found.with_context(|| {
            let names: Vec<_> = self.steps.iter().map(|step| step.name).collect();
            format!(
                "cargo xtask {} has no step {name}; its steps are: {}",
                self.name,
                names.join(", ")
            )
        })
    }

    /// Returns that nothing is to be recorded.
    pub(super) fn no_times(&self) -> Times {
        Times {
            suite: self.name,
            seconds: Vec::new(),
        }
    }

    fn list(steps: &[&Step]) {
        for step in steps {
            println!("{:14} {}", step.name, step.proves);
        }
    }

    /// Runs the steps that are asked for, and returns the times to record.
    pub(super) fn run(&self, sh: &Shell, options: &Options) -> anyhow::Result<Times> {
        let mut steps = Vec::new();
        for name in &options.steps {
            steps.push(self.step(name)?);
        }
        if steps.is_empty() {
            steps.extend(self.steps);
        }
        if options.list {
            Self::list(&steps);
            return Ok(self.no_times());
        }
        self.run_steps(sh, options, &steps, Vec::new())
    }

    /// Runs `steps` in turn until one fails, and sums up what was run, and what was not. Returns
    /// the times to record.
    pub(super) fn run_steps(
        &self,
        sh: &Shell,
        options: &Options,
        steps: &[&'static Step],
        crates: Vec<String>,
    ) -> anyhow::Result<Times> {
        let ci = sh.var_os("CI").is_some_and(|ci| ci == "true");
        if ci && sh.var_os(REQUIRE).is_none() {
            sh.set_var(REQUIRE, "all");
        }
        options.install.pass_on(sh);
        let left_out = LeftOut::begin(sh)?;
        let context = Context {
            sh,
            install: options.install,
            ci,
            record: options.record,
            crates,
            left_out,
            program: this_program()?.to_owned(),
        };
        let interrupt = Interrupt::pass_on()?;
        let mut durations = Durations::load(sh);
        let mut times = Vec::new();
        let start = Instant::now();
        for (number, step) in steps.iter().enumerate() {
            interrupt.check()?;
            let key = format!("{} {}", self.name, step.name);
            match durations.last(&key) {
                Some(last) => println!("\n== {} (last time: {last} s)", step.name),
                None => println!("\n== {}", step.name),
            }
            let start = Instant::now();
            let done = (step.run)(&context);
            let seconds = start.elapsed().as_secs();
            if let Err(error) = done {
                context.left_out.print()?;
                let (suite, name) = (self.name, step.name);
                let again = format!("run it again with `cargo xtask {suite} {name}`");
                let rest: Vec<_> = steps[number + 1..].iter().map(|step| step.name).collect();
                if !rest.is_empty() {
                    println!("not started: {}", rest.join(", "));
                }
                return Err(error.context(format!("{name} failed after {seconds} s; {again}")));
            }
            if context.crates.is_empty() && !harness::is_step() {
                durations.set(sh, &key, seconds)?;
            }
            times.push((step.name, seconds));
        }
        context.left_out.print()?;
        println!("\ncargo xtask {} passed:", self.name);
        for (name, seconds) in &times {
            println!("  {seconds:>5} s  {name}");
        }
        println!("  {:>5} s  in all", start.elapsed().as_secs());
        // The times of steps that were limited to some crates are not theirs.
        if !options.record || !context.crates.is_empty() {
            times.clear();
        }
        Ok(Times {
            suite: self.name,
            seconds: times,
        })
    }
}

/// Returns whether `program` can be run.
pub(super) fn is_installed(sh: &Shell, program: &str, arguments: &[&str]) -> bool {
    let found = cmd!(sh, "{program} {arguments...}");
    found.quiet().ignore_stdout().ignore_stderr().run().is_ok()
}
