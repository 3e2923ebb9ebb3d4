//! Recovery of interrupted group commits.

mod member;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;

use crate::directory::Directory;
use crate::durability::Durability;
use crate::error::RecoverError;
use crate::ids::UserId;
use crate::names::{NameKind, PREFIX, is_record_name, kind_of_name};
use crate::orphan::{Inspection, remove_if_orphaned};
use crate::record::{Member, Unreadable};
use crate::records::{is_trusted, list, read, records};
use crate::report::RecoverReport;
use crate::stat::stat_of;
use crate::sweep::sweep_open;
use crate::sys::{Lock, Unlock, file_owner, lock, try_lock};

use member::{MemberState, member_state};
pub(crate) use member::{is_foreign, old_file, rename_member};

/// Completes the published group commits of killed processes in `dir`, then [sweeps](crate::sweep)
/// the directory, which undoes the unpublished ones.
///
/// [`AtomicWriter::open`](crate::AtomicWriter::open) and every commit also complete the published
/// groups in their directory. Call this at start-up, before reading the files of a group: reading a
/// file recovers nothing. The call may be repeated, also after it was killed. It never waits.
///
/// Only the records of this user are trusted, and those of the directory's owner if no other user
/// may create files in it. A record can only cause renames within `dir`, and only of files with the
/// name of a staged file.
///
/// # Errors
/// Returns [`RecoverError::Stuck`] with the groups that could not be completed. Recovery never
/// guesses. It leaves unchanged: a damaged record, a staged file that is not the recorded one, a
/// group that lacks some of its staged files, and a group with a destination that another user's
/// file has taken. All other groups are completed, and the directory is swept.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let report = atomic_file::recover(dir.path())?;
/// for path in &report.completed {
///     eprintln!("{} was replaced", path.display());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn recover(dir: impl AsRef<Path>) -> Result<RecoverReport, RecoverError> {
    let dir = Directory::open(dir.as_ref()).map_err(|source| RecoverError::Io {
        operation: "open the directory",
        path: dir.as_ref().to_owned(),
        source,
    })?;
    let mut report = RecoverReport::default();
    let mut stuck = Vec::new();
    for name in records(&list(&dir)?) {
        match recover_pending(&dir, name, &mut report, |_| true) {
            Ok(Recovery::Removed | Recovery::Unwanted) => {}
            Ok(Recovery::Foreign) => report.foreign.push(dir.path_of(name)),
            Ok(Recovery::InProgress { .. }) => report.busy = true,
            Err(error) => stuck.push(error.error),
        }
    }
    report.swept = sweep_open(&dir, true)?;
    if stuck.is_empty() {
        return Ok(report);
    }
    Err(RecoverError::Stuck {
        dir: dir.path().to_owned(),
        first: Box::new(stuck.remove(0)),
        others: stuck,
        report: Box::new(report),
    })
}

/// Completes the interrupted groups among the records in `names`. If `wait` is set, waits for
/// groups of this user in progress that include the destination `dest`.
///
/// Completes all groups that include `dest`, and at most [`MAX_OTHER_GROUPS`] others: the owner of
/// the directory may have planted any number.
///
/// Fails only if a group that includes `dest` cannot be completed. Other groups do not concern this
/// destination. Neither does an unreadable record: after this writer's commit, the file at `dest`
/// is not the recorded old file, and so stays.
pub(crate) fn recover_pending_for(
    dir: &Directory,
    dest: &OsStr,
    names: &[OsString],
    wait: bool,
) -> Result<(), RecoverError> {
    let dests = [dest];
    let mut wanted = with_few_others(&dests);
    for name in records(names) {
        loop {
            match recover_pending(dir, name, &mut RecoverReport::default(), &mut wanted) {
                Ok(Recovery::InProgress { record, own })
                    if wait && own && is_member(dest, &record) =>
                {
                    // Wait until its process finishes or dies.
                    if lock(&record).is_err() {
                        break;
                    }
                    drop(Unlock(&record));
                }
                Err(stuck) if stuck.dests.iter().any(|member| member == dest) => {
                    return Err(stuck.error);
                }
                Ok(_) | Err(_) => break,
            }
        }
    }
    Ok(())
}

/// Maximum number of groups without its destination that a writer completes. Each takes several
/// syncs. [`recover`](fn@recover) completes all.
const MAX_OTHER_GROUPS: usize = 16;

/// Returns whether to complete a group: all groups with a destination in `dests`, and the first
/// [`MAX_OTHER_GROUPS`] others.
pub(crate) fn with_few_others(dests: &[&OsStr]) -> impl FnMut(&[Member]) -> bool {
    let mut others_left = MAX_OTHER_GROUPS;
    move |members| {
        if members.iter().any(|member| dests.contains(&&*member.dest)) {
            return true;
        }
        let is_left = others_left > 0;
        others_left = others_left.saturating_sub(1);
        is_left
    }
}

fn is_member(dest: &OsStr, record: &File) -> bool {
    let members = read(record).unwrap_or(Err(Unreadable::Damaged("unreadable")));
    members.is_ok_and(|members| members.iter().any(|member| member.dest == dest))
}

/// Returns whether no group of any user is published in `dir` or holds a ticket.
pub(crate) fn no_group_in_progress(dir: &Directory) -> io::Result<bool> {
    for name in dir.names(PREFIX)? {
        let stands = match kind_of_name(&name) {
            Some(NameKind::Ticket) => !matches!(
                remove_if_orphaned(dir, &name),
                Inspection::Removed | Inspection::Missing
            ),
            _ => is_record_name(&name),
        };
        if stands {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The result of recovering one record.
pub(crate) enum Recovery {
    /// The record was removed, by this call or before.
    Removed,
    /// The record is not trusted.
    Foreign,
    /// The group is not to be completed now.
    Unwanted,
    /// The process of the group is running.
    InProgress {
        record: File,
        /// Whether the record belongs to this user. Never wait for another user's record: its
        /// process may be stopped.
        own: bool,
    },
}

/// A record that could not be completed, and its destinations: none if it is unreadable.
pub(crate) struct Stuck {
    pub(crate) error: RecoverError,
    pub(crate) dests: Vec<OsString>,
}

impl From<RecoverError> for Stuck {
    fn from(error: RecoverError) -> Self {
        Self {
            error,
            dests: Vec::new(),
        }
    }
}

/// Completes the group with the record `name` and removes the record, if its process died and its
/// members are `wanted`. A torn record has none.
pub(crate) fn recover_pending(
    dir: &Directory,
    name: &OsStr,
    report: &mut RecoverReport,
    mut wanted: impl FnMut(&[Member]) -> bool,
) -> Result<Recovery, Stuck> {
    let path = dir.path_of(name);
    let failed = |operation| {
        let path = path.clone();
        move |source| RecoverError::Io {
            operation,
            path,
            source,
        }
    };
    loop {
        let Some(entry) = dir.entry(name).map_err(failed("look for"))? else {
            return Ok(Recovery::Removed);
        };
        if !is_trusted(dir, &entry) {
            return Ok(Recovery::Foreign);
        }
        let file = match dir.open_file(name) {
            Ok(file) => file,
            // Its process has just finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Recovery::Removed),
            Err(error) => return Err(failed("open")(error).into()),
        };
        match try_lock(&file).map_err(failed("lock"))? {
            Lock::Held => {}
            Lock::Taken => {
                let own = entry.uid.is(file_owner());
                return Ok(Recovery::InProgress { record: file, own });
            }
            Lock::Unsupported(error) => return Err(failed("lock")(error).into()),
        }
        let _unlock = Unlock(&file);
        // The name may be removed under the lock, if it still refers to the inspected file.
        let locked = stat_of(&file).map_err(failed("inspect"))?.id;
        let now = dir.entry(name).map_err(failed("look for"))?;
        if locked != entry.id || now.map(|now| now.id) != Some(locked) {
            continue;
        }
        let found = read(&file).map_err(failed("read"))?;
        let members = found.as_deref().unwrap_or_default();
        if !matches!(found, Err(Unreadable::Damaged(_))) && !wanted(members) {
            return Ok(Recovery::Unwanted);
        }
        match found {
            Ok(members) => {
                roll_forward(dir, name, entry.uid, &members, report).map_err(|error| Stuck {
                    error,
                    dests: members.into_iter().map(|member| member.dest).collect(),
                })?;
            }
            // It did not reach its commit point on the medium.
            Err(Unreadable::Torn(_)) => report.discarded.push(path.clone()),
            Err(Unreadable::Damaged(problem)) => {
                return Err(RecoverError::Damaged { path, problem }.into());
            }
        }
        dir.remove(name).map_err(failed("remove"))?;
        // So that a crash cannot restore it after later commits.
        dir.sync(Durability::Full).map_err(failed("remove"))?;
    }
}

/// Checks every member against the record, then renames the members that are still staged.
fn roll_forward(
    dir: &Directory,
    record: &OsStr,
    owner: UserId,
    members: &[Member],
    report: &mut RecoverReport,
) -> Result<(), RecoverError> {
    let (mut staged, mut lost) = (Vec::new(), Vec::new());
    let (mut in_place, mut superseded) = (Vec::new(), Vec::new());
    for member in members {
        let path = dir.path_of(&member.dest);
        match member_state(dir, record, owner, member)? {
            MemberState::Staged => staged.push(member),
            MemberState::InPlace => in_place.push(path),
            MemberState::Superseded => superseded.push(path),
            MemberState::Lost => lost.push(path),
        }
    }
    if !lost.is_empty() {
        // All members are old: the group is abandoned.
        if lost.len() == members.len() {
            report.lost.append(&mut lost);
            return Ok(());
        }
        let staged = staged.iter().map(|member| dir.path_of(&member.dest));
        return Err(RecoverError::StagesLost {
            lost,
            staged: staged.collect(),
            in_place,
            record: dir.path_of(record),
        });
    }
    report.in_place.append(&mut in_place);
    report.superseded.append(&mut superseded);
    for member in staged {
        rename_member(dir, member).map_err(|error| RecoverError::Io {
            operation: "replace",
            path: dir.path_of(&member.dest),
            source: error.of_rename(),
        })?;
        report.completed.push(dir.path_of(&member.dest));
    }
    dir.sync(Durability::Full)
        .map_err(|source| RecoverError::Io {
            operation: "sync the directory",
            path: dir.path().to_owned(),
            source,
        })
}
