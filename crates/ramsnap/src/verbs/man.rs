//! `ramsnap man`: manual pages.

use std::ffi::OsString;
use std::fs::{self, DirEntry};
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use atomic_file::AtomicWriter;
use clap::{Args, Command};

use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::print::{self, count};
use crate::session::Session;

/// Write the manual pages to a directory
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ramsnap man ~/.local/share/man/man1")]
pub struct Man {
    /// The directory, which is created if missing
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Replace pages that exist
    #[arg(long)]
    force: bool,
}

impl Man {
    /// Writes the pages of the tool's `command`.
    pub fn run(&self, session: &Session, command: Command) -> anyhow::Result<ExitStatus> {
        let dir = &self.dir;
        let failed = || format!("cannot write manual pages to {dir:?}");
        fs::create_dir_all(dir).with_context(failed)?;
        let pages = pages(command)?;
        for (name, _) in &pages {
            let path = dir.join(name);
            if !self.force && path.symlink_metadata().is_ok() {
                return Err(Failure::OutputExists { path }.into());
            }
        }
        session.hold();
        let critical = session.commit(dir);
        let options = AtomicWriter::options().mode(0o644).no_clobber(!self.force);
        for (name, text) in &pages {
            session.check("some of the pages were not written")?;
            let mut writer = options.open(dir.join(name))?;
            writer.write_all(text).with_context(failed)?;
            writer.commit()?;
        }
        critical.done();
        let pages = count(pages.len() as u64, "page");
        session.report(&format!("{}: {pages}", print::path(dir)))?;
        Ok(ExitStatus::Success)
    }
}

/// Returns the pages by name: one for the tool and one for each verb.
fn pages(command: Command) -> anyhow::Result<Vec<(OsString, Vec<u8>)>> {
    let making = "cannot make the manual pages";
    let dir = tempfile::tempdir().context(making)?;
    clap_mangen::generate_to(command, dir.path()).context(making)?;
    let read = |entry: io::Result<DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name(), fs::read(entry.path())?))
    };
    let pages = fs::read_dir(dir.path()).context(making)?.map(read);
    let mut pages: Vec<_> = pages.collect::<io::Result<_>>().context(making)?;
    pages.sort();
    Ok(pages)
}
