//! Group commits: several files replaced together.

mod add_error;
mod commit;
mod eligibility;
mod same_file;

use std::sync::Arc;

use crate::error::{CommitStep, GroupCommitError, Leftover};
use crate::names::{new_id, record_name};
use crate::record;
use crate::writer::AtomicWriter;

pub use add_error::{AddError, Ineligible};
use commit::{Commit, discard_all};

/// A group of files of one directory that are replaced together: all new or all old, also after a
/// crash at any point.
///
/// The commit publishes a small record of the renames, and removes it after the last one. If a
/// crash leaves the record behind, the next [`open`](AtomicWriter::open) or
/// [`commit`](AtomicWriter::commit) of one of the files, or [`recover`](crate::recover), completes
/// the renames. *Readers* do not see all files change in one instant: between the first and the
/// last rename, or between a crash and the recovery, a reader that opens the files by name may find
/// some new and some old. Such a reader must call `recover` first, or store an identifier in each
/// file.
///
/// The group uses the strongest [`Durability`](crate::Durability) of its members. Two groups of one
/// user with a common destination are serialized, so that their files never mix.
///
/// A recovery never undoes a commit of one file that returned `Ok`: the record identifies each
/// destination's old file, and a destination that was replaced since stays. If the file at a
/// destination belongs to a user other than the group's user and root, it is not considered a
/// commit. The staged files of the group then remain, and recovery fails until that file is
/// removed.
///
/// **Each name must be a member once.** [`add`](Self::add) and the commit refuse two spellings of
/// the name of an existing file, and names that differ only in case if the directory ignores case.
/// Two hard links to one file are two names: the commit gives each a new file. Two names that
/// differ only in Unicode composition cannot be recognized while neither file exists. In a
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
#[must_use = "a group that is dropped leaves its destinations unchanged: commit it"]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Member, Old};
    use crate::records::MAX_RECORD_LEN;

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
}
