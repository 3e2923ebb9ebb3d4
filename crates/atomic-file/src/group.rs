//! Group commits: several files replaced together.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::destination::Destination;
use crate::directory::Directory;
use crate::durability::Durability;
use crate::error::{CommitStep, GroupCommitError, Leftover};
use crate::names::{new_id, record_name};
use crate::record::{self, Member, Old};
use crate::records::{MAX_RECORD_LEN, is_trusted, protects_all};
use crate::recover::{is_foreign, old_file, rename_member};
use crate::rename::PublishError;
use crate::staged_file::StagedFile;
use crate::stat::stat_of;
use crate::sys;
use crate::ticket::acquire_ticket;
use crate::writer::AtomicWriter;

/// A group of files of one directory that are replaced together: all new or all old, also after a
/// crash at any point.
///
/// The commit publishes a small record of the renames, and removes it after the last one. If a
/// crash leaves the record behind, the next [`open`](AtomicWriter::open) or
/// [`commit`](AtomicWriter::commit) in the directory, or [`recover`](crate::recover), completes the
/// renames. *Readers* do not see all files change in one instant: between the first and the last
/// rename, or between a crash and the recovery, a reader that opens the files by name may find some
/// new and some old. Such a reader must call `recover` first, or store an identifier in each file.
///
/// The group uses the strongest [`Durability`] of its members. Two groups of one user with a common
/// destination are serialized, so that their files never mix.
///
/// A recovery never undoes a commit of one file that returned `Ok`: the record identifies each
/// destination's old file, and a destination that was replaced since stays. If the file at a
/// destination belongs to a user other than the group's user and root, it is not considered a
/// commit. The staged files of the group then remain, and recovery fails until that file is
/// removed.
///
/// **Each file must be a member once.** [`add`](Self::add) and the commit refuse two names of one
/// existing file, and names that differ only in case if the directory ignores case. Two names that
/// differ only in Unicode composition cannot be recognised while neither file exists. In a
/// directory that ignores composition (APFS, HFS+, directories of ext4 and tmpfs that ignore case),
/// the later one of them then replaces the earlier one.
///
/// # Examples
/// ```
/// use std::io::Write;
/// use atomic_file::{AtomicGroup, AtomicWriter};
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
///
/// let mut memory = AtomicWriter::open(dir.join("vm.mem"))?;
/// let mut state = AtomicWriter::open(dir.join("vm.state"))?;
/// memory.write_all(b"pages")?;
/// state.write_all(b"registers")?;
///
/// let mut group = AtomicGroup::new();
/// group.add(memory)?;
/// group.add(state)?;
/// group.commit()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AtomicGroup {
    members: Vec<AtomicWriter>,
    /// Length of the group's record, in bytes.
    record_len: u64,
}

impl Default for AtomicGroup {
    fn default() -> Self {
        Self {
            members: Vec::new(),
            record_len: record::EMPTY,
        }
    }
}

impl AtomicGroup {
    /// Returns a group without members. Its commit does nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a writer. All bytes must have been written, because the group does not return the
    /// writer.
    ///
    /// # Errors
    /// Returns an [`AddError`] with the writer if it cannot be a member: see [`Ineligible`].
    pub fn add(&mut self, writer: AtomicWriter) -> Result<(), AddError> {
        match self.ineligible(&writer) {
            None => {
                self.record_len += len_in_record(&writer);
                self.members.push(writer);
                Ok(())
            }
            Some(reason) => Err(AddError {
                reason,
                writer: Box::new(writer),
            }),
        }
    }

    fn ineligible(&self, writer: &AtomicWriter) -> Option<Ineligible> {
        let dir = &writer.dest.dir;
        let others = || self.members.iter().map(|member| &member.dest);
        if writer.staged.dir().stat.id != dir.stat.id {
            Some(Ineligible::StagedElsewhere)
        } else if others().any(|other| other.dir.stat.id != dir.stat.id) {
            Some(Ineligible::OtherDirectory)
        } else if others().any(|other| other.name == writer.dest.name) {
            Some(Ineligible::SameDestination)
        } else if others().any(|other| names_same_file(writer, other)) {
            Some(Ineligible::SameFile)
        } else if self.record_len + len_in_record(writer) > MAX_RECORD_LEN {
            Some(Ineligible::TooManyMembers)
        } else if writer.no_clobber {
            Some(Ineligible::NoClobber)
        } else if writer.replace_only.is_some() {
            Some(Ineligible::ReplaceOnly)
        } else if !writer.staged.is_locked() {
            Some(Ineligible::NoLocks)
        } else if !sys::has_lasting_inode_numbers(dir).unwrap_or(false) {
            Some(Ineligible::NoInodeNumbers)
        } else if dir
            .generation(writer.staged.name())
            .is_ok_and(|found| found == 0)
        {
            Some(Ineligible::NoGenerations)
        } else {
            None
        }
    }

    /// Returns the number of members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Returns whether the group has no members.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Removes the staged files of all members.
    ///
    /// # Errors
    /// Returns the files that could not be removed.
    pub fn discard(self) -> Result<(), Vec<Leftover>> {
        let leftovers = discard_all(self.members);
        if leftovers.is_empty() {
            Ok(())
        } else {
            Err(leftovers)
        }
    }

    /// Replaces every destination, or none.
    ///
    /// Waits while another group of this user with a common destination is being committed.
    ///
    /// # Errors
    /// Returns a [`GroupCommitError`] that states what was replaced and how to complete the group.
    pub fn commit(self) -> Result<(), GroupCommitError> {
        let Some(first) = self.members.first() else {
            return Ok(());
        };
        let dir = Arc::clone(&first.dest.dir);
        let durability = self.members.iter().map(|member| member.durability).max();
        let durability = durability.unwrap_or_default();
        let id = match new_id() {
            Ok(id) => id,
            Err(source) => {
                return Err(GroupCommitError::NothingReplaced {
                    step: CommitStep::Record,
                    path: dir.path().to_owned(),
                    source,
                    leftovers: discard_all(self.members),
                });
            }
        };
        Commit {
            id,
            record: dir.path_of(&record_name(id)),
            dir,
            durability,
            members: self.members,
        }
        .run()
    }
}

fn len_in_record(writer: &AtomicWriter) -> u64 {
    record::len_of_member(writer.staged.name(), &writer.dest.name)
}

/// Returns whether the destinations, which have different names in one directory, are known to be
/// the same file: by the inode number of an existing file, or by case.
///
/// Names that differ only in Unicode composition ("é" as one or two code points) are not recognised
/// while neither file exists. The commit compares the files again.
fn names_same_file(writer: &AtomicWriter, other: &Destination) -> bool {
    let dest = &writer.dest;
    let ids = [dest, other].map(|dest| dest.entry.map(|entry| (entry.id, entry.links)));
    // Two names of a file with several links are different destinations.
    if let [Some((one, 1)), Some((another, 1))] = ids
        && one == another
    {
        return true;
    }
    case_folded(&dest.name) == case_folded(&other.name)
        && ignores_case(&dest.dir, writer.staged.name())
}

/// Looks up the staged file's name, which is random and lower-case, in upper case. Inode numbers
/// are not compared: a FUSE server may return a different one for each spelling.
fn ignores_case(dir: &Directory, staged: &OsStr) -> bool {
    dir.entry(&staged.to_ascii_uppercase())
        .is_ok_and(|entry| entry.is_some())
}

/// Returns the name as a case-insensitive directory compares it.
fn case_folded(name: &OsStr) -> OsString {
    match name.to_str() {
        // Convert to upper case first: some lower-case letters become several upper-case ones.
        Some(name) => name.to_uppercase().to_lowercase().into(),
        None => name.to_ascii_lowercase(),
    }
}

fn discard_all(members: Vec<AtomicWriter>) -> Vec<Leftover> {
    members
        .into_iter()
        .filter_map(|member| member.discard().err())
        .collect()
}

/// An error of adding a writer to an [`AtomicGroup`](crate::AtomicGroup). Returns the writer.
#[derive(Debug, Error)]
#[error("{:?} cannot join the group: {reason}", writer.dest_path())]
pub struct AddError {
    /// The reason.
    pub reason: Ineligible,
    /// The unchanged writer.
    pub writer: Box<AtomicWriter>,
}

/// A reason why a writer cannot be a member of a group.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ineligible {
    /// It is staged in another directory than the group's first member.
    #[error(
        "it is staged in another directory than the other members; use one directory per group"
    )]
    OtherDirectory,
    /// It is not staged in the directory of its destination.
    #[error("it is not staged in the directory of its destination; open it without `staging_dir`")]
    StagedElsewhere,
    /// A member has the same destination.
    #[error("another member has the same destination; add each destination once")]
    SameDestination,
    /// It was opened with `no_clobber`.
    #[error("a recovery after a crash cannot guarantee `no_clobber`; open it without that option")]
    NoClobber,
    /// It was opened with `replace_only`.
    #[error(
        "a recovery after a crash cannot guarantee `replace_only`; open it without that option"
    )]
    ReplaceOnly,
    /// The file system has no working `flock`.
    #[error(
        "its file system cannot lock files, and recovery could not detect interrupted groups; \
         commit the files one by one"
    )]
    NoLocks,
    /// The destination's name and that of a member refer to the same file, or differ only in case
    /// in a directory that ignores case.
    #[error(
        "the name of another member refers to the same file: the directory ignores \
         case; add each file once"
    )]
    SameFile,
    /// The record of the group would exceed the maximum length that recoveries read.
    #[error("the group has too many members for its record; commit it in parts")]
    TooManyMembers,
    /// The file system stores neither a time of creation nor a file handle, so a recovery could not
    /// detect that a later commit replaced the destination.
    #[error(
        "its file system provides neither a time of creation nor a file handle, and recovery could \
         undo a later commit; commit the files one by one"
    )]
    NoGenerations,
    /// The file system does not keep inode numbers across mounts (FAT, exFAT), or may not (FUSE).
    #[error(
        "its file system may not keep inode numbers, and recovery could not recognise the staged \
         files; commit the files one by one"
    )]
    NoInodeNumbers,
}

/// A commit in progress.
struct Commit {
    dir: Arc<Directory>,
    id: u64,
    record: PathBuf,
    durability: Durability,
    members: Vec<AtomicWriter>,
}

/// Two members with names of one file, created or renamed since they were added.
fn same_file_error(other: &OsStr) -> io::Error {
    let reason = format!(
        "the directory takes it and {other:?}, another member, for names of one file; add each file \
         once"
    );
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

/// The failed step, the affected path, and the error.
type Failure = (CommitStep, PathBuf, io::Error);

impl Commit {
    fn run(mut self) -> Result<(), GroupCommitError> {
        let staged = self.prepare().and_then(|intents| {
            let record = self.stage_record(&intents)?;
            Ok((intents, record))
        });
        let (intents, record) = match staged {
            Ok(staged) => staged,
            Err(failure) => return Err(self.nothing_replaced(failure)),
        };
        // Hold the record's lock to the end: it keeps other processes from recovering this group.
        let record = self.publish(record)?;

        let stopped = |path, source| GroupCommitError::RollForwardPending { path, source };
        self.dir
            .sync(self.durability)
            .map_err(|source| stopped(self.record.clone(), source))?;
        for (member, intent) in self.members.iter().zip(&intents) {
            rename_member(&self.dir, intent).map_err(|error| {
                let (path, source) = (member.dest.path.clone(), error.of_rename());
                match self.foreign_owner(&intent.dest, &source) {
                    Some(owner) => GroupCommitError::DestinationTaken {
                        path,
                        owner,
                        source,
                    },
                    None => stopped(path, source),
                }
            })?;
        }
        self.dir.sync(self.durability).map_err(|source| {
            GroupCommitError::ReplacedDurabilityUnknown {
                dir: self.dir.path().to_owned(),
                source,
            }
        })?;
        let removed = self
            .dir
            .remove(&record_name(self.id))
            .and_then(|()| self.dir.sync(self.durability));
        drop(record);
        removed.map_err(|source| GroupCommitError::ReplacedRecordLeft {
            record: self.record,
            source,
        })
    }

    /// Returns the user whose file at `dest` caused the rename to fail, if any.
    fn foreign_owner(&self, dest: &OsStr, error: &io::Error) -> Option<u32> {
        let of_a_file = matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory
        );
        let entry = self.dir.entry(dest).ok().flatten()?;
        (of_a_file && is_foreign(&entry, sys::file_owner())).then_some(entry.uid)
    }

    /// Syncs every member and checks its destination.
    fn prepare(&self) -> Result<Vec<Member>, Failure> {
        let mut intents = Vec::with_capacity(self.members.len());
        let mut old_files = BTreeMap::new();
        for writer in &self.members {
            let at = |step| move |error| (step, writer.dest.path.clone(), error);
            writer
                .finish(self.durability)
                .map_err(|(step, error)| at(step)(error))?;
            let stat = writer.staged.check().map_err(at(CommitStep::Check))?;
            let entry = self.dir.entry(&writer.dest.name);
            let in_the_way = entry.map_err(at(CommitStep::Check))?;
            if in_the_way.is_some_and(|entry| entry.is_dir()) {
                let error = io::Error::from(io::ErrorKind::IsADirectory);
                return Err(at(CommitStep::Check)(error));
            }
            // A file with several links may have both names.
            if let Some(entry) = in_the_way.filter(|entry| entry.links == 1)
                && let Some(other) = old_files.insert(entry.id.inode, &writer.dest.name)
            {
                return Err(at(CommitStep::Check)(same_file_error(other)));
            }
            intents.push(Member {
                inode: stat.id.inode,
                size: stat.size,
                old: Old::Unknown,
                staged: writer.staged.name().to_owned(),
                dest: writer.dest.name.clone(),
            });
        }
        Ok(intents)
    }

    /// Returns whether a member's staged file belongs to another user.
    fn changes_owners(&self) -> io::Result<bool> {
        for writer in &self.members {
            if stat_of(writer.file())?.uid != sys::file_owner() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes the record once no other group with a common destination is in progress.
    fn stage_record(&self, intents: &[Member]) -> Result<StagedFile, Failure> {
        let at = |(step, error)| (step, self.record.clone(), error);
        let of_record = |error| at((CommitStep::Record, error));
        let create = || {
            let record = StagedFile::create(&self.dir, OsStr::new(""))?;
            if !record.is_locked() {
                return Err(io::Error::from(io::ErrorKind::Unsupported));
            }
            if !is_trusted(&self.dir, &stat_of(record.file())?) {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the file system changes the owner or mode of this user's files, so that no \
                     recovery could trust the record; commit the files one by one, or in a \
                     directory that no one else may write to",
                ));
            }
            let stat = stat_of(record.file())?;
            if self.changes_owners()? && !protects_all(&self.dir, &stat) {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "the group's files belong to another user, whose sweep would remove them; \
                     only root's groups, and those of the directory's owner where no others may \
                     write, can preserve an owner",
                ));
            }
            record.file().write_all_at(&record::encode(intents), 0)?;
            Ok(record)
        };
        let mut record = create().map_err(of_record)?;
        let dests: Vec<_> = intents
            .iter()
            .map(|member| member.dest.as_os_str())
            .collect();
        acquire_ticket(&mut record, self.id, &dests).map_err(at)?;
        let write = || {
            let mut members = intents.to_vec();
            for member in &mut members {
                member.old = old_file(&self.dir, &member.dest)?;
            }
            record.file().write_all_at(&record::encode(&members), 0)?;
            sys::sync(record.file(), self.durability)?;
            self.dir.sync(self.durability)
        };
        write().map_err(of_record)?;
        Ok(record)
    }

    /// Publishes the record. This is the commit point once the directory is synced: the staged
    /// files are no longer removed on drop.
    fn publish(&mut self, mut record: StagedFile) -> Result<StagedFile, GroupCommitError> {
        match record.publish(&self.dir, &record_name(self.id), false) {
            Ok(_) => {
                self.disarm_members();
                Ok(record)
            }
            Err(PublishError::NotPublished(error)) => {
                drop(record);
                let failure = (CommitStep::Record, self.record.clone(), error);
                Err(self.nothing_replaced(failure))
            }
            Err(PublishError::Unknown { rename, look }) => {
                record.disarm();
                self.disarm_members();
                Err(GroupCommitError::Unknown {
                    record: self.record.clone(),
                    rename,
                    source: look,
                })
            }
        }
    }

    fn disarm_members(&mut self) {
        for member in &mut self.members {
            member.staged.disarm();
        }
    }

    fn nothing_replaced(&mut self, (step, path, source): Failure) -> GroupCommitError {
        GroupCommitError::NothingReplaced {
            step,
            path,
            source,
            leftovers: discard_all(std::mem::take(&mut self.members)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_beyond_the_record_limit_is_returned() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name| AtomicWriter::open(dir.path().join(name)).unwrap();
        let mut group = AtomicGroup::new();
        // Simulate a group with other members.
        group.record_len = MAX_RECORD_LEN - len_in_record(&open("memory"));
        group.add(open("memory")).unwrap();
        assert_eq!(group.record_len, MAX_RECORD_LEN);
        let error = group.add(open("vcpu")).unwrap_err();
        assert_eq!(error.reason, Ineligible::TooManyMembers);
    }

    #[test]
    fn the_record_length_matches_its_encoding() {
        let dir = tempfile::tempdir().unwrap();
        let mut group = AtomicGroup::new();
        for name in ["memory", "vcpu"] {
            let writer = AtomicWriter::open(dir.path().join(name)).unwrap();
            group.add(writer).unwrap();
        }
        let members: Vec<_> = group
            .members
            .iter()
            .map(|writer| Member {
                inode: 0,
                size: 0,
                old: Old::Unknown,
                staged: writer.staged.name().to_owned(),
                dest: writer.dest.name.clone(),
            })
            .collect();
        assert_eq!(record::encode(&members).len() as u64, group.record_len);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn names_of_one_file_match_if_the_directory_ignores_case() {
        const NAMES: [(&str, &str, bool); 4] = [
            ("vm.mem", "VM.MEM", true),
            ("\u{e9}tat", "\u{c9}tat", true),
            ("vm.mem", "vm.state", false),
            ("vm.mem", "vm-mem", false),
        ];
        let same = |dir: &std::path::Path, one: &str, other: &str| {
            let open = |name| AtomicWriter::open(dir.join(name)).unwrap();
            names_same_file(&open(one), &open(other).dest)
        };
        let dir = tempfile::tempdir().unwrap();
        for (one, other, _) in NAMES {
            assert!(!same(dir.path(), one, other), "{one} {other}");
        }
        test_machine::needs!(Mount(test_machine::FileSystem::EXFAT));
        let disk = test_machine::LoopMount::new(test_machine::FileSystem::EXFAT).unwrap();
        for (one, other, expected) in NAMES {
            assert_eq!(same(disk.path(), one, other), expected, "{one} {other}");
        }
    }

    /// A file with several links may have both names.
    #[test]
    fn hard_links_are_different_destinations() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        std::fs::write(&one, "").unwrap();
        std::fs::hard_link(&one, &other).unwrap();
        let open = |path| AtomicWriter::open(path).unwrap();
        assert!(!names_same_file(&open(&one), &open(&other).dest));
    }
}
