//! Checks the texts of the workspace, and the packages that it publishes.
//!
//! Run it by `cargo xtask test prose`, `cargo xtask ci packages` and `cargo xtask prove packages`.

mod error_texts;
mod packages;
mod plurals;
mod prose;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use harness::interrupt::Interrupt;
use xshell::Shell;

/// Check the texts of the workspace, or the packages that it publishes
#[derive(Parser)]
struct SourceChecks {
    #[arg(value_enum)]
    check: Check,
}

#[derive(Clone, Copy, ValueEnum)]
enum Check {
    /// Texts and names use the project's terms, and text wraps at 100 columns
    Prose,
    /// Archives and manifests are complete, and no dependency needs a newer compiler
    Packages,
    /// Each crate builds from its archive, with each set of its features, and with the oldest
    /// dependencies
    PackageBuilds,
}

fn main() -> ExitCode {
    let check = SourceChecks::parse().check;
    harness::run(|sh| {
        let _interrupt = Interrupt::pass_on()?;
        check.run(sh)
    })
}

impl Check {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        match self {
            Self::Prose => prose::check(sh),
            Self::Packages => {
                packages::check_archives(sh)?;
                packages::check_rust_versions(sh)
            }
            Self::PackageBuilds => {
                packages::build_archives(sh)?;
                packages::check_feature_sets(sh)?;
                packages::check_oldest_dependencies(sh)
            }
        }
    }
}
