//! `ramsnap completions`: completion scripts for shells.

use clap::{Args, Command};
use clap_complete::Shell;

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
    /// Prints the script for the tool's `command`.
    pub fn run(&self, mut command: Command) -> anyhow::Result<ExitStatus> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "ramsnap", &mut script);
        print::line(String::from_utf8_lossy(&script).trim_end())?;
        Ok(ExitStatus::Success)
    }
}
