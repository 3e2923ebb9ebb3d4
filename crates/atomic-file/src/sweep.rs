//! Removing what killed processes left.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use crate::directory::Directory;
use crate::error::SweepError;
use crate::recover::Records;
use crate::staged_file::{Inspection, NameKind, Orphan, PREFIX, kind_of_name};

/// How many files are locked at a time. The records are looked for once while they are: one listing
/// for each file would take time with the square of their number.
const BATCH: usize = 64;

/// What [`sweep`] found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SweepReport {
    /// Dead stages, removed.
    pub removed: Vec<PathBuf>,
    /// Stages whose writers live, in this process or another; not touched.
    pub living: Vec<PathBuf>,
    /// Files kept for [recycling](crate::Options::recycle), removed: no writer was killed, and the next will
    /// write a new file.
    pub spares: Vec<PathBuf>,
    /// What has a stage's name and was kept for another reason.
    pub kept: Vec<Kept>,
}

/// Something with a stage's name that was not removed.
#[derive(Debug)]
#[non_exhaustive]
pub struct Kept {
    /// Where it is.
    pub path: PathBuf,
    /// Why it was kept: no permission to open it, no locks on its file system, a group commit pending, not a file.
    pub reason: io::Error,
}

/// Removes from `dir` the staged files of writers that were killed, whatever their destinations, and the spares of those that recycle, and nothing else.
/// Never waits.
///
/// A stage is dead if its name is a stage's and nobody holds its lock. Living writers hold it, in
/// this process, in others, and where the file system knows such locks (NFS does) on other machines.
/// What the record of an interrupted group commit names is kept: call [`recover`](crate::recover).
/// Each record is read once. Of each other user's records at most 16 MiB are read: where that user
/// has more, all staged files of that user are kept.
///
/// A writer that is opened removes the orphaned staged files of its own destination. Those of
/// destinations that nothing is written to any more stay until this is called, on start-up or from
/// time to time.
///
/// # Errors
/// [`SweepError`] where the directory cannot be opened or listed. What stands in the way of a single file is in the report.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let report = atomic_file::sweep(dir.path())?;
/// assert!(report.removed.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn sweep(dir: impl AsRef<Path>) -> Result<SweepReport, SweepError> {
    sweep_open(&open(dir.as_ref())?, true)
}

/// Says what [`sweep`] would do, and removes nothing: [`SweepReport::removed`] and
/// [`SweepReport::spares`] are what it would remove.
///
/// # Errors
/// As with [`sweep`].
pub fn preview_sweep(dir: impl AsRef<Path>) -> Result<SweepReport, SweepError> {
    sweep_open(&open(dir.as_ref())?, false)
}

fn open(dir: &Path) -> Result<Directory, SweepError> {
    Directory::open(dir).map_err(|source| SweepError {
        operation: "open",
        path: dir.to_owned(),
        source,
    })
}

pub(crate) fn sweep_open(dir: &Directory, remove: bool) -> Result<SweepReport, SweepError> {
    let names = dir.names(PREFIX).map_err(|source| SweepError {
        operation: "list",
        path: dir.path().to_owned(),
        source,
    })?;
    let staged = names
        .iter()
        .filter_map(|name| Some((name, kind_of_name(name)?)));
    sweep_names(dir, &staged.collect::<Vec<_>>(), remove)
}

/// Sweeps these names in `dir` alone.
pub(crate) fn sweep_names(
    dir: &Directory,
    staged: &[(&OsString, NameKind)],
    remove: bool,
) -> Result<SweepReport, SweepError> {
    let mut report = SweepReport::default();
    let mut records = Records::default();
    // Before anything is locked, so that no lock is held for long.
    let _ = records.refresh(dir, None);
    for batch in staged.chunks(BATCH) {
        let locked: Vec<_> = batch
            .iter()
            .map(|(name, kind)| match kind {
                NameKind::Locked | NameKind::Recycled | NameKind::Ticket => Orphan::lock(dir, name),
                NameKind::Unlocked => Err(Inspection::Retained(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "staged without a lock: only you can know whether its writer lives",
                ))),
            })
            .collect();
        records.refresh(dir, None).map_err(|source| SweepError {
            operation: "look for group records in",
            path: dir.path().to_owned(),
            source,
        })?;
        for ((name, kind), orphan) in batch.iter().zip(locked) {
            let inspected = match orphan {
                Ok(orphan) => orphan.resolve(dir, name, &records, remove),
                Err(inspected) => inspected,
            };
            let path = dir.path_of(name);
            match inspected {
                Inspection::Removed if *kind == NameKind::Recycled => report.spares.push(path),
                Inspection::Removed => report.removed.push(path),
                Inspection::InUse => report.living.push(path),
                Inspection::Retained(reason) => report.kept.push(Kept { path, reason }),
                Inspection::Missing => {}
            }
        }
    }
    Ok(report)
}
