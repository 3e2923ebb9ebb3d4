//! Sweeping: removal of orphaned staged files.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;

use crate::directory::Directory;
use crate::error::SweepError;
use crate::ids::UserId;
use crate::names::{NameKind, PREFIX, is_staged_for, kind_of_name};
use crate::orphan::{Inspection, Orphan};
use crate::records::Records;
use crate::report::{Skipped, SweepReport};
use crate::stat::FileId;
use crate::sys::file_owner;
use crate::trace;

/// Number of files that are locked at a time. The records are listed once per batch: one listing
/// per file would take quadratic time.
const BATCH: usize = 64;

/// Removes the orphaned staged files of all destinations from `dir`, and the recycled files, and
/// nothing else. Never waits.
///
/// A staged file is orphaned if no process holds its lock. A running writer holds the lock in this
/// process, in other processes and, if the file system supports it (NFS does), on other machines.
/// Files that the record of an interrupted group commit names are kept: call
/// [`recover`](crate::recover). Each record is read once. At most 16 MiB of the records of each
/// other user are read. If such a user has more, all staged files of that user are kept.
///
/// `open` removes the orphaned staged files of its own destination. Those of destinations that are
/// no longer written remain until this function is called: call it at start-up or periodically.
///
/// # Errors
/// Returns a [`SweepError`] if the directory cannot be opened or listed. The report contains the
/// errors of single files.
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

/// Returns the report that [`sweep`] would return, but removes nothing: [`SweepReport::removed`]
/// and [`SweepReport::recycled`] list the files that it would remove. Files that this process may
/// not remove are in [`SweepReport::skipped`], with the error of the system.
///
/// # Errors
/// Returns the errors of [`sweep`].
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

/// Sweeps only these names in `dir`.
pub(crate) fn sweep_names(
    dir: &Directory,
    staged: &[(&OsString, NameKind)],
    remove: bool,
) -> Result<SweepReport, SweepError> {
    let mut report = SweepReport::default();
    let mut records = Records::default();
    // Read the records before locking, so that locks are held only briefly.
    let _ = records.refresh(dir, None);
    let mut left: VecDeque<_> = staged.iter().copied().collect();
    while !left.is_empty() {
        let batch: Vec<_> = left.drain(..left.len().min(BATCH)).collect();
        let locked: Vec<_> = batch
            .iter()
            .map(|(name, kind)| match kind {
                NameKind::Locked | NameKind::Recycled | NameKind::Ticket => Orphan::lock(dir, name),
                NameKind::Unlocked => Err(Inspection::Retained(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "staged without a lock: remove it once its writer has ended",
                ))),
            })
            .collect();
        let own_locks: Vec<_> = locked.iter().flatten().map(Orphan::id).collect();
        records.refresh(dir, None).map_err(|source| SweepError {
            operation: "look for group records in",
            path: dir.path().to_owned(),
            source,
        })?;
        for ((name, kind), orphan) in batch.into_iter().zip(locked) {
            let inspected = match orphan {
                Ok(orphan) => orphan.resolve(dir, name, &records, remove),
                Err(inspected) => inspected,
            };
            let path = dir.path_of(name);
            match inspected {
                Inspection::Removed if kind == NameKind::Recycled => report.recycled.push(path),
                Inspection::Removed => report.removed.push(path),
                // A writer that was killed between `link` and `unlink` leaves two names of one
                // file, and this sweep holds its lock by the other name.
                Inspection::InUse if is_one_of(dir, name, &own_locks) => {
                    left.push_back((name, kind));
                }
                Inspection::InUse => report.in_use.push(path),
                Inspection::Retained(reason) => report.skipped.push(Skipped { path, reason }),
                Inspection::Missing => {}
            }
        }
    }
    if remove {
        report_events(dir, &report);
    }
    Ok(report)
}

/// Reports what a sweep removed and what it kept, as events.
fn report_events(dir: &Directory, report: &SweepReport) {
    for path in report.removed.iter().chain(&report.recycled) {
        trace::orphan_removed(path);
    }
    for path in &report.in_use {
        trace::kept_in_use(path);
    }
    for skipped in &report.skipped {
        trace::kept(&skipped.path, &skipped.reason);
    }
    let removed = report.removed.len() + report.recycled.len();
    trace::swept(dir.path(), removed, report.in_use.len());
}

fn is_one_of(dir: &Directory, name: &OsStr, files: &[FileId]) -> bool {
    let entry = dir.entry(name).ok().flatten();
    entry.is_some_and(|entry| files.contains(&entry.id))
}

/// Removes the orphaned staged files of `dest` among the `names` in `dir`.
///
/// A writer that preserves the owner may have changed it to `dest_owner`, the owner of the
/// destination. Files of other users are not opened, because this writer must not remove them.
pub(crate) fn remove_leftovers(
    dir: &Directory,
    dest: &OsStr,
    dest_owner: Option<UserId>,
    names: &[OsString],
) {
    let own = file_owner();
    let owners = [own, dest_owner.unwrap_or(own)];
    let ours = |name: &OsStr| {
        let entry = dir.entry(name).ok().flatten();
        entry.is_some_and(|entry| entry.uid.is_any_of(&owners))
    };
    let leftovers: Vec<_> = names
        .iter()
        .filter(|name| is_staged_for(dest, name) && ours(name))
        .map(|name| (name, NameKind::Locked))
        .collect();
    if !leftovers.is_empty() {
        // Files that remain do not affect writers. A sweep reports them.
        let _ = sweep_names(dir, &leftovers, true);
    }
}
