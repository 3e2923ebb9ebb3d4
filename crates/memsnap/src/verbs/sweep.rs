//! `memsnap sweep`: the files that killed writers left.

use std::path::{Path, PathBuf};

use atomic_file::{RecoverError, RecoverReport, preview_sweep, recover, sweep};
use clap::Args;
use serde::Serialize;

use crate::Verdict;
use crate::print::{self, count};
use crate::session::Session;

/// Remove the staged files that killed writers left in directories
///
/// A writer stages its file beside the output, under a name such as
/// .atomic-file-88662993-0f1e2d3c4b5a6978.stage, and locks it. A file that no one has locked is an
/// orphan, whatever it was to become. Files kept for recycling are removed as well. Nothing else is
/// touched, and nothing that a writer uses.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    memsnap sweep --dry-run /var/lib/snapshots\n  \
    memsnap sweep /var/lib/snapshots /dev/shm\n  \
    memsnap sweep --recover /var/lib/snapshots")]
pub struct Sweep {
    /// Directories; not those in them
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Say what would be removed, and remove nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Complete interrupted commits of groups of files first: what such a group staged is kept otherwise
    #[arg(long, conflicts_with = "dry_run")]
    recover: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found in the directories.
#[derive(Debug, Default, Serialize)]
struct Found {
    dry_run: bool,
    removed: Vec<PathBuf>,
    in_use: Vec<PathBuf>,
    kept: Vec<Kept>,
    replaced: Vec<PathBuf>,
    superseded: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Kept {
    file: PathBuf,
    reason: String,
}

impl Sweep {
    pub fn run(&self, session: &Session) -> anyhow::Result<Verdict> {
        let mut found = Found {
            dry_run: self.dry_run,
            ..Found::default()
        };
        let mut stuck = None;
        for dir in &self.dirs {
            let report = match self.sweep(dir) {
                Ok(done) => done,
                // The rest of the directory was swept all the same, and so are the others.
                Err(error) => match error.downcast() {
                    Ok(RecoverError::Stuck {
                        dir,
                        first,
                        others,
                        report,
                    }) => {
                        for other in &others {
                            session.warn(&other.to_string());
                        }
                        let what = format!("interrupted commits in {dir:?} could not be completed");
                        stuck.get_or_insert(anyhow::Error::new(*first).context(what));
                        *report
                    }
                    Ok(error) => return Err(error.into()),
                    Err(error) => return Err(error),
                },
            };
            found.add(report);
        }
        self.print(session, &found)?;
        stuck.map_or(Ok(Verdict::Good), Err)
    }

    fn sweep(&self, dir: &Path) -> anyhow::Result<RecoverReport> {
        if self.recover {
            return Ok(recover(dir)?);
        }
        let sweep = if self.dry_run { preview_sweep } else { sweep };
        let mut report = RecoverReport::default();
        report.swept = sweep(dir)?;
        Ok(report)
    }

    fn print(&self, session: &Session, found: &Found) -> anyhow::Result<()> {
        if self.json {
            return print::json(found);
        }
        let removed = match self.dry_run {
            true => "would be removed",
            false => "removed",
        };
        for path in &found.replaced {
            session.say(&format!(
                "{}: replaced by its group's commit",
                path.display()
            ))?;
        }
        for path in &found.superseded {
            session.say(&format!(
                "{}: superseded: a later commit replaced it, and its group's file is gone",
                path.display()
            ))?;
        }
        for path in &found.removed {
            session.say(&format!("{}: {removed}", path.display()))?;
        }
        for path in &found.in_use {
            session.say(&format!("{}: in use", path.display()))?;
        }
        for kept in &found.kept {
            session.say(&format!("{}: kept: {}", kept.file.display(), kept.reason))?;
        }
        session.say(&format!(
            "{} {removed}, {} in use, {} kept",
            count(found.removed.len() as u64, "file"),
            found.in_use.len(),
            found.kept.len()
        ))
    }
}

impl Found {
    fn add(&mut self, report: RecoverReport) {
        self.replaced.extend(report.completed);
        self.superseded.extend(report.superseded);
        let swept = report.swept;
        self.removed.extend(swept.removed);
        self.removed.extend(swept.spares);
        self.in_use.extend(swept.living);
        self.kept.extend(swept.kept.into_iter().map(|kept| Kept {
            file: kept.path,
            reason: kept.reason.to_string(),
        }));
    }
}
