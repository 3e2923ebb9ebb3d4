//! Finishing what a killed process left half-done.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};

use crate::directory::{Directory, Stat, stat_of};
use crate::error::RecoverError;
use crate::options::Durability;
use crate::record::{self, Member, Old, Unreadable, is_record_name};
use crate::rename::{PublishError, confirm_rename};
use crate::staged_file::{Inspection, NameKind, PREFIX, kind_of_name, remove_if_orphaned};
use crate::sweep::{SweepReport, sweep_open};
use crate::sys::{Lock, Unlock, file_owner, lock, try_lock};

/// What [`recover`] found and did.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RecoverReport {
    /// Destinations replaced by this call.
    pub completed: Vec<PathBuf>,
    /// Destinations that the killed process had replaced already.
    pub in_place: Vec<PathBuf>,
    /// Destinations that a later commit, by the group's own user or root, has replaced; that
    /// commit's file stays, and the group's file for it is gone.
    pub superseded: Vec<PathBuf>,
    /// Destinations of groups that are given up: all of their staged files are gone, and every
    /// destination is still what it was before the group. Where only some of a group's staged files
    /// are gone, that is an error, [`RecoverError::StagesLost`].
    pub lost: Vec<PathBuf>,
    /// Whether a group commit is under way in the directory, by a process that lives; nothing was done about it.
    pub busy: bool,
    /// Intent records that a power loss had cut short, removed. Their groups did not wait for the
    /// medium ([`Durability::None`]), so some of their files may be old and some new.
    pub discarded: Vec<PathBuf>,
    /// Files with an intent record's name that were ignored: another user put them there, or may
    /// have.
    pub foreign: Vec<PathBuf>,
    /// What became of the stages found, those of unpublished groups among them.
    pub swept: SweepReport,
}

/// Completes the group commits that killed processes left published in `dir`, then [sweeps](crate::sweep) the directory,
/// which undoes the unpublished ones.
///
/// [`AtomicWriter::open`](crate::AtomicWriter::open) and every commit complete the published groups in their directory too;
/// call this on start-up, before reading the files of a group, as readers know nothing of records.
/// Calling it twice, or killing it at any point and calling it again, does no harm. It never waits.
///
/// Only the records of this user are obeyed, and those of the directory's owner where no other user
/// may create files in it. All that a record can cause is that a file with a staged file's name is
/// renamed within `dir`.
///
/// # Errors
/// [`RecoverError::Stuck`] names the groups that could not be completed. Nothing is guessed at: a
/// damaged record, or a staged file that is not the one recorded, is left as it is, and so is a group
/// some of whose staged files are gone, or whose destination was taken by a file of another user. All other groups
/// were completed and the directory was swept nevertheless.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let report = atomic_file::recover(dir.path())?;
/// for path in &report.completed {
///     eprintln!("{} is now the new one", path.display());
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
        match recover_pending(&dir, name, &mut report) {
            Ok(Recovery::Removed) => {}
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

/// The names of the protocol's files in `dir`.
pub(crate) fn list(dir: &Directory) -> Result<Vec<OsString>, RecoverError> {
    dir.names(PREFIX).map_err(|source| RecoverError::Io {
        operation: "list the directory",
        path: dir.path().to_owned(),
        source,
    })
}

fn records(names: &[OsString]) -> impl Iterator<Item = &OsString> {
    names.iter().filter(|name| is_record_name(name))
}

/// Completes the dead groups among the records in `names`. Where `wait` is set, waits for those in
/// progress of this user that have the destination `dest`.
///
/// Fails only where a group that has `dest` cannot be completed. Other groups are none of this
/// destination's business, and so is a record that cannot be read: the file at `dest` once this
/// writer has committed is not what the record says was there, and so stays.
pub(crate) fn recover_pending_for(
    dir: &Directory,
    dest: &OsStr,
    names: &[OsString],
    wait: bool,
) -> Result<(), RecoverError> {
    for name in records(names) {
        loop {
            match recover_pending(dir, name, &mut RecoverReport::default()) {
                Ok(Recovery::InProgress { record, own })
                    if wait && own && is_member(dest, &record) =>
                {
                    // Until its owner has finished, or died.
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

fn is_member(dest: &OsStr, record: &File) -> bool {
    let members = read(record).unwrap_or(Err(Unreadable::Damaged("unreadable")));
    members.is_ok_and(|members| members.iter().any(|member| member.dest == dest))
}

/// Whether no group, of whatever user, is published in `dir` or about to be.
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

/// Whether no record stands in `dir` that a recovery by this user would obey.
pub(crate) fn no_trusted_record(dir: &Directory) -> io::Result<bool> {
    for name in records(&dir.names(PREFIX)?) {
        if dir
            .entry(name)?
            .is_some_and(|entry| is_trusted(dir, &entry))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whose files a record keeps from being swept.
///
/// A foreign record protects the files of its own user only: otherwise anyone could keep a sweep
/// from removing anything. Root's protects all: where owners are preserved, root's staged files are
/// given to other users before they are renamed, and nobody but root can write such a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Protects {
    All,
    FilesOf(u32),
}

/// The staged files that the published records of a directory name. Each record is read once.
#[derive(Debug, Default)]
pub(crate) struct Records {
    seen: HashSet<OsString>,
    named: HashSet<(OsString, Protects)>,
    /// Of records that may name any file: damaged ones, and those that were not read.
    unknown: HashSet<Protects>,
    /// How many bytes were read of the records of other users.
    read: HashMap<u32, u64>,
}

impl Records {
    /// Reads the records that came to `dir` since the last call; where a user is given, only those
    /// that may protect that user's files.
    pub(crate) fn refresh(&mut self, dir: &Directory, user: Option<u32>) -> io::Result<()> {
        for name in records(&dir.names(PREFIX)?) {
            if self.seen.contains(name) {
                continue;
            }
            let Some(entry) = dir.entry(name)? else {
                continue;
            };
            // The name is random: no other record will have it.
            self.seen.insert(name.clone());
            let protects = match is_trusted(dir, &entry) || is_root_record(dir, &entry) {
                true => Protects::All,
                false => Protects::FilesOf(entry.uid),
            };
            let concerns = |user| protects == Protects::All || protects == Protects::FilesOf(user);
            if entry.is_file() && user.is_none_or(concerns) {
                self.add(dir, name, entry.uid, protects);
            }
        }
        Ok(())
    }

    fn add(&mut self, dir: &Directory, name: &OsStr, owner: u32, protects: Protects) {
        match self.read(dir, name, owner) {
            Ok(Ok(members)) => {
                let named = members.into_iter().map(|member| (member.staged, protects));
                self.named.extend(named);
            }
            Ok(Err(Unreadable::Torn(_))) => {}
            // Its owner has just finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(Unreadable::Damaged(_))) | Err(_) => {
                self.unknown.insert(protects);
            }
        }
    }

    fn read(
        &mut self,
        dir: &Directory,
        name: &OsStr,
        owner: u32,
    ) -> io::Result<Result<Vec<Member>, Unreadable>> {
        let file = dir.open_file(name)?;
        if owner == file_owner() {
            return read(&file);
        }
        let read = self.read.entry(owner).or_default();
        let Some(bytes) = bytes_of(&file, MAX_RECORD_LEN.min(MAX_FOREIGN_BYTES - *read))? else {
            return Ok(Err(Unreadable::Damaged("too long")));
        };
        *read += bytes.len() as u64;
        Ok(record::decode(&bytes))
    }

    /// Whether the file `stage` of the user `uid` is named by a record seen, and so is not an orphan.
    pub(crate) fn name(&self, staged: &OsStr, uid: u32) -> bool {
        [Protects::All, Protects::FilesOf(uid)]
            .into_iter()
            .any(|by| self.unknown.contains(&by) || self.named.contains(&(staged.to_owned(), by)))
    }
}

/// Whether a record is root's doing.
fn is_root_record(dir: &Directory, record: &Stat) -> bool {
    const ROOT: u32 = 0;
    record.uid == ROOT && only_owner_could_write(dir, record)
}

/// Whether a record is one of those that protect staged files of all users from all sweeps: root's,
/// and where no other user may create files, the directory owner's.
pub(crate) fn protects_all(dir: &Directory, record: &Stat) -> bool {
    is_root_record(dir, record) || (record.uid == dir.stat.uid && !dir.others_may_create())
}

/// Whether no other user can have given a file of its owner this name, or written to it.
fn only_owner_could_write(dir: &Directory, record: &Stat) -> bool {
    const GROUP_AND_OTHERS: u32 = 0o077;
    record.is_file()
        && (!dir.others_may_create() || (record.links == 1 && record.mode & GROUP_AND_OTHERS == 0))
}

/// Whether a record is one that this user's recoveries carry out.
///
/// It must not be another user's doing. Where others may create files, a file of this user may have
/// been given the record's name by a hard link, or have been written to by others.
pub(crate) fn is_trusted(dir: &Directory, record: &Stat) -> bool {
    let own = record.uid == file_owner();
    let owners = record.uid == dir.stat.uid && !dir.others_may_create();
    (own || owners) && only_owner_could_write(dir, record)
}

/// What became of a record.
pub(crate) enum Recovery {
    /// It was removed, by this call or before.
    Removed,
    /// It is not one to obey.
    Foreign,
    /// Its owner lives.
    InProgress {
        record: File,
        /// Whether the record belongs to this user. Another user's must not be waited for: a process
        /// can be stopped.
        own: bool,
    },
}

/// A record that could not be completed, and the destinations it concerns: none if it cannot be read.
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

/// Completes the group whose record is `name` and removes the record, if its owner is dead.
pub(crate) fn recover_pending(
    dir: &Directory,
    name: &OsStr,
    report: &mut RecoverReport,
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
            // Its owner has just finished.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Recovery::Removed),
            Err(error) => return Err(failed("open")(error).into()),
        };
        match try_lock(&file).map_err(failed("lock"))? {
            Lock::Held => {}
            Lock::Taken => {
                let own = entry.uid == file_owner();
                return Ok(Recovery::InProgress { record: file, own });
            }
            Lock::Unsupported(error) => return Err(failed("lock")(error).into()),
        }
        let _unlock = Unlock(&file);
        // Under the lock the name is ours to remove, if it still means the file that we looked at.
        let locked = stat_of(&file).map_err(failed("inspect"))?.id;
        let now = dir.entry(name).map_err(failed("look for"))?;
        if locked != entry.id || now.map(|now| now.id) != Some(locked) {
            continue;
        }
        match read(&file).map_err(failed("read"))? {
            Ok(members) => {
                roll_forward(dir, name, entry.uid, &members, report).map_err(|error| Stuck {
                    error,
                    dests: members.into_iter().map(|member| member.dest).collect(),
                })?;
            }
            // It never got to its commit point, as far as the medium knows.
            Err(Unreadable::Torn(_)) => report.discarded.push(path.clone()),
            Err(Unreadable::Damaged(problem)) => {
                return Err(RecoverError::Damaged { path, problem }.into());
            }
        }
        dir.remove(name).map_err(failed("remove"))?;
        // So that it never comes back to a directory that has moved on.
        dir.sync(Durability::Full).map_err(failed("remove"))?;
    }
}

/// In bytes: at least twelve thousand members; no record is larger.
pub(crate) const MAX_RECORD_LEN: u64 = 4 << 20;
/// At most how many bytes are read of the records of each other user in one sweep: what any user can
/// have root read. What else they name is kept.
const MAX_FOREIGN_BYTES: u64 = 4 * MAX_RECORD_LEN;

/// The members of a record, from its beginning.
pub(crate) fn read(file: &File) -> io::Result<Result<Vec<Member>, Unreadable>> {
    let bytes = bytes_of(file, MAX_RECORD_LEN)?;
    Ok(bytes.map_or(Err(Unreadable::Damaged("too long")), |bytes| {
        record::decode(&bytes)
    }))
}

/// All bytes of a file, unless it is longer than `limit`.
fn bytes_of(mut file: &File, limit: u64) -> io::Result<Option<Vec<u8>>> {
    if file.metadata()?.len() > limit {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.rewind()?;
    // It may be growing.
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Replaces what is not replaced yet, once every member has been found to be what the record says.
fn roll_forward(
    dir: &Directory,
    record: &OsStr,
    owner: u32,
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
        // All old: it never happened.
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

enum MemberState {
    Staged,
    InPlace,
    Superseded,
    /// Its staged file is gone, and its destination is what it was before the group.
    Lost,
}

/// Where a member of a record that belongs to the user `owner` has got to.
fn member_state(
    dir: &Directory,
    record: &OsStr,
    owner: u32,
    member: &Member,
) -> Result<MemberState, RecoverError> {
    let inspect = |name: &OsStr| {
        let path = dir.path_of(name);
        move |source| RecoverError::Io {
            operation: "inspect",
            path,
            source,
        }
    };
    let entry = |name: &OsStr| dir.entry(name).map_err(inspect(name));
    let dest = entry(&member.dest)?;
    if dest.is_some_and(|dest| dest.id.inode == member.inode) {
        return Ok(MemberState::InPlace);
    }
    if dest.is_some_and(|dest| dest.is_dir()) {
        return Err(RecoverError::DestinationIsDirectory {
            dest: dir.path_of(&member.dest),
            record: dir.path_of(record),
        });
    }
    match entry(&member.staged)? {
        // No one sweeps it while the record stands. So it was renamed, and its destination then
        // replaced again or removed; or against the rules somebody removed it.
        None if member.old == Old::Unknown => return Ok(MemberState::Superseded),
        None => {
            let now = old_file(dir, &member.dest).map_err(inspect(&member.dest))?;
            return Ok(match now == member.old {
                true => MemberState::Lost,
                false => MemberState::Superseded,
            });
        }
        Some(staged)
            if staged.is_file()
                && (staged.id.inode, staged.size) == (member.inode, member.size) => {}
        // Where the directory is a copy, no inode number is what the record says.
        Some(_) => {
            return Err(RecoverError::StageChanged {
                stage: dir.path_of(&member.staged),
                dest: dir.path_of(&member.dest),
                record: dir.path_of(record),
            });
        }
    }
    let replaced_since = match (dest, member.old) {
        // There is nothing that could be undone, or nothing that could tell.
        (None, _) | (_, Old::Unknown) => false,
        (Some(_), old) => old_file(dir, &member.dest).map_err(inspect(&member.dest))? != old,
    };
    match dest {
        // It may have been put there to have the staged file given up: it is no later commit.
        Some(dest) if replaced_since && is_foreign(&dest, owner) => {
            Err(RecoverError::DestinationTaken {
                dest: dir.path_of(&member.dest),
                owner: dest.uid,
                record: dir.path_of(record),
            })
        }
        _ if replaced_since => Ok(MemberState::Superseded),
        _ => Ok(MemberState::Staged),
    }
}

/// Whether a file belongs to another user than `owner` and root.
pub(crate) fn is_foreign(file: &Stat, owner: u32) -> bool {
    const ROOT: u32 = 0;
    file.uid != owner && file.uid != ROOT
}

/// What is at a destination, for a record to say.
pub(crate) fn old_file(dir: &Directory, dest: &OsStr) -> io::Result<Old> {
    let Some(entry) = dir.entry(dest)? else {
        return Ok(Old::Nothing);
    };
    match dir.generation(dest) {
        Ok(generation) => Ok(Old::File {
            inode: entry.id.inode,
            generation,
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Old::Nothing),
        Err(error) => Err(error),
    }
}

/// Puts one member of a published group in place.
pub(crate) fn rename_member(dir: &Directory, member: &Member) -> Result<(), PublishError> {
    let is_at = |name: &OsStr| {
        dir.entry(name)
            .map(|entry| entry.is_some_and(|entry| entry.id.inode == member.inode))
    };
    confirm_rename(
        || dir.rename(&member.staged, dir, &member.dest),
        || is_at(&member.dest),
        || is_at(&member.staged).is_ok_and(|here| here),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_no_group_can_have_is_not_read_to_its_end() {
        const LIMIT: u64 = MAX_RECORD_LEN;
        let file = tempfile::tempfile().unwrap();
        for (len, too_long) in [(LIMIT, false), (LIMIT + 1, true), (1 << 40, true)] {
            file.set_len(len).unwrap();
            let problem = read(&file).unwrap().unwrap_err();
            let refused = problem == Unreadable::Damaged("too long");
            assert_eq!(refused, too_long, "{len}: {problem:?}");
        }
    }
}
