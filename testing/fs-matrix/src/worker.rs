//! The side that does the checking: this program once more, on the mounted directory, in the guest
//! where need be.

use std::path::PathBuf;

use scenarios::target::{Mutant, Target};

use super::checks;
use super::finding::Line;
use super::fixture::Fixture;

/// Checks a mounted directory and prints a line of JSON for each finding.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Worker {
    /// A new directory on the file system to check
    #[arg(long)]
    pub dir: PathBuf,
    /// A directory on a small file system of the same kind
    #[arg(long)]
    pub small: Option<PathBuf>,
    /// A directory on any other file system
    #[arg(long)]
    pub elsewhere: PathBuf,
    #[arg(long, value_enum)]
    pub mutant: Option<Mutant>,
    /// Only the checks of these names
    #[arg(long)]
    pub check: Vec<String>,
    /// Report the checks of these names as not run
    #[arg(long)]
    pub skip: Vec<String>,
}

impl Worker {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut fixture = Fixture {
            dir: self.dir,
            small: self.small,
            elsewhere: self.elsewhere,
            target: Target(self.mutant),
            #[cfg(target_os = "linux")]
            server: None,
        };
        // Not locked: a panic's message goes to the standard error, and this must not wait for it.
        let mut out = std::io::stdout();
        checks::run_all(&mut fixture, &self.check, &self.skip, &mut out)?;
        Ok(Line::Done.send(&mut out)?)
    }
}
