//! The programs under `testing/` that tasks run.
//!
//! xtask links no crate of the product: it has cargo build such a program, and becomes it. Exit
//! codes and signals are then the program's own.

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

impl Arguments {
    /// Builds `program` and runs it in the place of this process. Returns only where it can't be
    /// run.
    pub(crate) fn run(self, program: &str) -> anyhow::Result<()> {
        let manifest = harness::workspace()?.join("Cargo.toml");
        let mut cargo = Command::new("cargo");
        cargo.args(["run", "--quiet", "--manifest-path"]);
        // No package is named: cargo then selects the packages that `cargo test` selects, and the
        // programs share one build of each dependency, and of most with the tests.
        cargo.arg(manifest).args(["--bin", program]);
        cargo.args(["--features", harness::FEATURES, "--"]);
        Err(cargo.args(self.arguments).exec()).context("can't run cargo")
    }
}
