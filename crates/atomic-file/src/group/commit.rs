//! The steps of a group commit.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use super::same_file::is_one_file;
use crate::destination::check_again;
use crate::directory::Directory;
use crate::durability::Durability;
use crate::error::{CommitStep, GroupCommitError, Leftover};
use crate::names::record_name;
use crate::record::{self, Member, Old};
use crate::records::{is_trusted, protects_all};
use crate::recover::{is_foreign, old_file, rename_member};
use crate::rename::PublishError;
use crate::staged_file::StagedFile;
use crate::stat::stat_of;
use crate::sys;
use crate::ticket::acquire_ticket;
use crate::writer::AtomicWriter;

/// A commit in progress.
pub(super) struct Commit {
    pub(super) dir: Arc<Directory>,
    pub(super) id: u64,
    pub(super) record: PathBuf,
    pub(super) durability: Durability,
    pub(super) members: Vec<AtomicWriter>,
}

/// Discards the staged files. Returns those that could not be removed.
pub(super) fn discard_all(members: Vec<AtomicWriter>) -> Vec<Leftover> {
    members
        .into_iter()
        .filter_map(|member| member.discard().err())
        .collect()
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
    pub(super) fn run(mut self) -> Result<(), GroupCommitError> {
        let staged = self.prepare().and_then(|intents| {
            let record = self.stage_record(&intents)?;
            Ok((intents, record))
        });
        let (intents, record) = match staged {
            Ok(staged) => staged,
            Err(failure) => return Err(self.nothing_replaced(failure)),
        };
        // Once the record is published, a member that cannot be renamed leaves the group in parts.
        if let Err(failure) = self.check_members() {
            drop(record);
            return Err(self.nothing_replaced(failure));
        }
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
        (of_a_file && is_foreign(&entry, sys::file_owner())).then_some(entry.uid.raw())
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
            let in_the_way = entry.map_err(at(CommitStep::Destination))?;
            if in_the_way.is_some_and(|entry| entry.is_dir()) {
                let error = io::Error::from(io::ErrorKind::IsADirectory);
                return Err(at(CommitStep::Destination)(error));
            }
            // A file with several links may have both names.
            if let Some(entry) = in_the_way.filter(|entry| entry.links == 1)
                && let Some(other) = old_files.insert(entry.id.inode, &writer.dest.name)
            {
                // The other name was looked up before a sync, which may take long.
                let is_one = is_one_file(&self.dir, other, &writer.dest.name);
                if is_one.map_err(at(CommitStep::Destination))? {
                    return Err(at(CommitStep::Destination)(same_file_error(other)));
                }
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

    /// Repeats the checks of `open`, and that each staged file is in place: either may have changed
    /// while the members were synced, or while another group was waited for.
    fn check_members(&self) -> Result<(), Failure> {
        self.members.iter().try_for_each(|writer| {
            let at = |step| move |error| (step, writer.dest.path.clone(), error);
            writer.staged.check().map_err(at(CommitStep::Check))?;
            check_again(&writer.dest).map_err(at(CommitStep::Destination))
        })
    }

    /// Returns whether a member's staged file belongs to another user.
    fn changes_owners(&self) -> io::Result<bool> {
        for writer in &self.members {
            if !stat_of(writer.file())?.uid.is(sys::file_owner()) {
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
            if !sys::file_owner().is_mapped() {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "this user namespace does not map this user, so that no recovery could tell \
                     who wrote the record; commit the files one by one, or map the user",
                ));
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
