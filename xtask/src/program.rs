//! The programs under `testing/` that tasks and steps run.
//!
//! xtask links no crate of the product: it has cargo build and run such a program. A task becomes
//! its program: exit codes and signals are then the program's own.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;

/// The arguments of a task, for the program that the task is.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// See `cargo xtask TASK --help`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "OPTIONS"
    )]
    arguments: Vec<OsString>,
}

/// Returns the arguments by which cargo builds `program` and runs it. Those of the program follow.
pub(crate) fn cargo_arguments(program: &str) -> anyhow::Result<Vec<OsString>> {
    let manifest = harness::workspace()?.join("Cargo.toml");
    let mut arguments = ["run", "--quiet", "--manifest-path"]
        .map(OsString::from)
        .to_vec();
    // No package is named: cargo then selects the packages that `cargo test` selects, and the
    // programs share one build of each dependency, and of most with the tests.
    arguments.extend([manifest.into(), "--bin".into(), program.into()]);
    arguments.extend(["--features", harness::FEATURES, "--"].map(OsString::from));
    Ok(arguments)
}

impl Arguments {
    /// Builds `program` and runs it in the place of this process. Returns only where it can't be
    /// run.
    pub(crate) fn run(self, program: &str) -> anyhow::Result<()> {
        let mut cargo = Command::new("cargo");
        cargo.args(cargo_arguments(program)?).args(self.arguments);
        Err(cargo.exec()).context("can't run cargo")
    }
}
