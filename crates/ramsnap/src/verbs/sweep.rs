//! `ramsnap sweep`: removal of orphaned staged files.

use std::path::{Path, PathBuf};

use atomic_file::{RecoverError, RecoverReport, preview_sweep, recover, sweep};
use clap::Args;
use serde::Serialize;
use vmm_files::CloudHypervisorSnapshot;

use crate::exit_status::ExitStatus;
use crate::print::{self, JsonPath, count};
use crate::session::Session;
use crate::{staged_dir, words};

/// Remove the staged files that killed writers left in directories
///
/// A writer stages its file beside the output, under a name such as
/// .atomic-file-88662993-0f1e2d3c4b5a6978.stage, and locks it. A file that is not locked is
/// orphaned, and is removed regardless of its output. Files kept for recycling are removed as well,
/// and so are directories that `ramsnap convert --to cloud-hypervisor` left (.ramsnap-Ab3dE6).
/// Other files, and files that a writer uses, are not touched.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap sweep --dry-run /var/lib/snapshots\n  \
    ramsnap sweep /var/lib/snapshots /dev/shm\n  \
    ramsnap sweep --recover /var/lib/snapshots")]
pub struct Sweep {
    /// Directories, without their subdirectories. A failure does not stop the sweep of the others
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// List the files that would be removed, and remove nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Complete interrupted commits of groups of files first; without it, the staged files of such
    /// groups are kept
    #[arg(long, conflicts_with = "dry_run")]
    recover: bool,
    /// As JSON: an object of lists. A path that is not UTF-8 is an object: text, and bytes_hex
    #[arg(long)]
    pub json: bool,
}

/// The files that were found in the directories.
#[derive(Debug, Default, Serialize)]
struct Found {
    dry_run: bool,
    removed: Vec<JsonPath>,
    in_use: Vec<JsonPath>,
    kept: Vec<Kept>,
    replaced: Vec<JsonPath>,
    superseded: Vec<JsonPath>,
    lost: Vec<JsonPath>,
    failed: Vec<Failed>,
}

#[derive(Debug, Serialize)]
struct Kept {
    file: JsonPath,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Failed {
    dir: JsonPath,
    reason: String,
}

impl Sweep {
    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let mut found = Found {
            dry_run: self.dry_run,
            ..Found::default()
        };
        let mut failures = Vec::new();
        for dir in &self.dirs {
            // The sweep of the files reports a directory that cannot be listed.
            if let Ok(swept) = staged_dir::sweep(dir, &staged_files(), !self.dry_run) {
                found.add_dirs(swept);
            }
            let error = match self.sweep(dir) {
                Ok(report) => {
                    found.add(report);
                    continue;
                }
                Err(error) => error,
            };
            // The rest of the directory was swept nevertheless.
            match error.downcast() {
                Ok(RecoverError::Stuck {
                    dir,
                    first,
                    others,
                    report,
                }) => {
                    found.add(*report);
                    let what = format!("interrupted commits in {dir:?} could not be completed");
                    let all = [*first].into_iter().chain(others);
                    let all = all.map(|why| anyhow::Error::new(why).context(what.clone()));
                    failures.extend(all.map(|error| (dir.clone(), error)));
                }
                Ok(error) => failures.push((dir.clone(), error.into())),
                Err(error) => failures.push((dir.clone(), error)),
            }
        }
        found.failed = failures
            .iter()
            .map(|(dir, error)| Failed {
                dir: dir.clone().into(),
                reason: words::text(error),
            })
            .collect();
        let mut failures = failures.into_iter().map(|(_, error)| error);
        let first = failures.next();
        for other in failures {
            words::print_error(&other);
        }
        let reported = self.report(session, &found);
        match (first, reported) {
            (None, reported) => reported.map(|()| ExitStatus::Success),
            (Some(error), Ok(())) => Err(error),
            (Some(error), Err(unreported)) => {
                words::print_error(&error);
                Err(unreported)
            }
        }
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

    fn report(&self, session: &Session, found: &Found) -> anyhow::Result<()> {
        if self.json {
            return Ok(Session::report_as_asked(&print::json_text(found)?)?);
        }
        Ok(session.report(&self.text(found))?)
    }

    fn text(&self, found: &Found) -> String {
        let removed = match self.dry_run {
            true => "would be removed",
            false => "removed",
        };
        let mut lines = Vec::new();
        let mut list = |paths: &[JsonPath], what: &str| {
            lines.extend(
                paths
                    .iter()
                    .map(|path| format!("{}: {what}", print::path(path))),
            );
        };
        list(&found.replaced, "replaced by its group's commit");
        list(
            &found.superseded,
            "superseded: a later commit replaced it, and its group's file is gone",
        );
        list(
            &found.lost,
            "lost: all files that its group's commit had staged are gone, and all are as before",
        );
        list(&found.removed, removed);
        list(&found.in_use, "in use");
        for kept in &found.kept {
            lines.push(format!(
                "{}: kept: {}",
                print::path(&kept.file),
                kept.reason
            ));
        }
        let failed = match found.failed.len() {
            0 => String::new(),
            failed => format!(", {}", count(failed as u64, "failure")),
        };
        lines.push(format!(
            "{} {removed}, {} in use, {} kept{failed}",
            count(found.removed.len() as u64, "file"),
            found.in_use.len(),
            found.kept.len()
        ));
        lines.join("\n")
    }
}

impl Found {
    fn add(&mut self, report: RecoverReport) {
        let paths = |paths: Vec<PathBuf>| paths.into_iter().map(JsonPath::from);
        self.replaced.extend(paths(report.completed));
        self.superseded.extend(paths(report.superseded));
        self.lost.extend(paths(report.lost));
        let swept = report.swept;
        self.removed.extend(paths(swept.removed));
        self.removed.extend(paths(swept.recycled));
        self.in_use.extend(paths(swept.in_use));
        self.kept.extend(swept.skipped.into_iter().map(|kept| Kept {
            file: kept.path.into(),
            reason: words::recovering(&kept.reason.to_string()),
        }));
    }

    fn add_dirs(&mut self, swept: staged_dir::Swept) {
        self.removed
            .extend(swept.removed.into_iter().map(JsonPath::from));
        self.in_use
            .extend(swept.in_use.into_iter().map(JsonPath::from));
        self.kept.extend(swept.kept.into_iter().map(|(path, why)| {
            let (file, reason) = (path.into(), why.to_string());
            Kept { file, reason }
        }));
    }
}

/// Returns the names of the files in a directory that a conversion writes.
fn staged_files() -> Vec<&'static str> {
    let others = CloudHypervisorSnapshot::OTHERS.into_iter();
    others.chain([CloudHypervisorSnapshot::MEMORY]).collect()
}
