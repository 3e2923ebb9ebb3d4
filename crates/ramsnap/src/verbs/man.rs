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
        if dir.exists() && !dir.is_dir() {
            return Err(Failure::NotADirectory { path: dir.clone() }.into());
        }
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

/// Keeps the lines of examples and tables in `page` as they are: roff fills text otherwise.
fn line_by_line(page: &str) -> String {
    const EXTRA: &str = ".SH EXTRA\n";
    let Some((before, after)) = page.split_once(EXTRA) else {
        return page.to_owned();
    };
    let (extra, rest) = match after.find("\n.SH ") {
        Some(at) => after.split_at(at + 1),
        None => (after, ""),
    };
    let mut text = format!("{before}{EXTRA}");
    let mut is_filled = true;
    for line in extra.lines() {
        let fill = !line.starts_with(' ');
        if fill != is_filled {
            text += if fill { ".fi\n" } else { ".nf\n" };
            is_filled = fill;
        }
        text += line;
        text.push('\n');
    }
    if !is_filled {
        text += ".fi\n";
    }
    text + rest
}

/// Returns the pages by name: one for the tool and one for each verb.
fn pages(command: Command) -> anyhow::Result<Vec<(OsString, Vec<u8>)>> {
    let making = "cannot make the manual pages";
    let dir = tempfile::tempdir().context(making)?;
    clap_mangen::generate_to(command, dir.path()).context(making)?;
    let read = |entry: io::Result<DirEntry>| {
        let entry = entry?;
        let text = line_by_line(&fs::read_to_string(entry.path())?);
        Ok((entry.file_name(), text.into_bytes()))
    };
    let pages = fs::read_dir(dir.path()).context(making)?.map(read);
    let mut pages: Vec<_> = pages.collect::<io::Result<_>>().context(making)?;
    pages.sort();
    Ok(pages)
}
