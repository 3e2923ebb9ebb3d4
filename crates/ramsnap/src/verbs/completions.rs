//! `ramsnap completions`: completion scripts for shells.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit_status::ExitStatus;
use crate::print;

/// Print the completion script for a shell
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ramsnap completions bash > ~/.local/share/bash-completion/completions/ramsnap"
)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub fn run(&self) -> anyhow::Result<ExitStatus> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "ramsnap", &mut script);
        print::line(String::from_utf8_lossy(&script).trim_end())?;
        Ok(ExitStatus::Success)
    }
}
