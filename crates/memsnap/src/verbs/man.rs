//! `memsnap man`: manual pages.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};

use crate::Verdict;
use crate::cli::Cli;
use crate::print::count;
use crate::session::Session;

/// Write the manual pages to a directory
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  memsnap man ~/.local/share/man/man1")]
pub struct Man {
    /// The directory, made if it is not there
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Man {
    pub fn run(&self, session: &Session) -> anyhow::Result<Verdict> {
        let dir = &self.dir;
        let write = || {
            std::fs::create_dir_all(dir)?;
            clap_mangen::generate_to(Cli::command(), dir)
        };
        write().with_context(|| format!("cannot write manual pages to {dir:?}"))?;
        // One for the tool, one a verb.
        let pages = 1 + Cli::command().get_subcommands().count() as u64;
        session.report(&format!("{}: {}", dir.display(), count(pages, "page")))?;
        Ok(Verdict::Good)
    }
}
