//! Errors of commits, by the state that they leave.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A staged file that could not be removed.
///
/// It is orphaned: [`sweep`](crate::sweep) removes it, and so does the next writer to the same
/// destination, unless it is the empty file of a preflight
/// ([`OpenError::Leftover`](crate::OpenError::Leftover)).
#[derive(Debug, Error)]
#[error("the staged file {path:?} could not be removed: {source}")]
pub struct Leftover {
    /// The staged file.
    pub path: PathBuf,
    /// The error of the removal.
    pub source: io::Error,
}

/// A step of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitStep {
    /// Looking for group commits of killed processes in the directory, and completing them.
    Recover,
    /// Verifying that the name of the staged file still refers to the file that was written.
    Check,
    /// Verifying that the destination is not a device, FIFO or socket by now. A group also repeats
    /// the other checks of `open`, and verifies that the destination is not the file of another
    /// member.
    Destination,
    /// Writing and syncing the group record.
    Record,
    /// Setting the mode and the preserved attributes of the staged file.
    Attributes,
    /// Syncing the bytes of the staged file.
    Sync,
    /// Comparing the destination with the version to
    /// [replace](crate::AtomicWriterOptions::replace_only), under its lock.
    Compare,
    /// Renaming the staged file.
    Rename,
}

impl fmt::Display for CommitStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recover => "completing the group commits pending in the directory",
            Self::Check => "finding the staged file",
            Self::Destination => "checking the destination",
            Self::Record => "writing the group record",
            Self::Attributes => "setting the mode and attributes of the staged file",
            Self::Sync => "syncing the staged file",
            Self::Compare => "comparing the destination with the file that was read",
            Self::Rename => "renaming the staged file",
        })
    }
}

/// An error of [`commit`](crate::AtomicWriter::commit), by the state that it leaves.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The destination is unchanged, and the staged file was removed. Open a new writer to try
    /// again.
    ///
    /// With `no_clobber`, a source of the kind [`AlreadyExists`](io::ErrorKind::AlreadyExists)
    /// means that the destination was created after the writer was opened.
    #[error("{dest:?} was not replaced: {step} failed{}: {source}", and_left(leftover.as_ref()))]
    NotReplaced {
        /// The destination.
        dest: PathBuf,
        /// The step that failed.
        step: CommitStep,
        /// The error of the step.
        source: io::Error,
        /// The staged file, if it could not be removed.
        leftover: Option<Leftover>,
    },
    /// The destination is no longer the version to
    /// [replace](crate::AtomicWriterOptions::replace_only). It is unchanged, and the staged file
    /// was removed.
    #[error(
        "{dest:?} was not replaced: another writer replaced, removed or wrote to it since it was \
         read; read it again and open a new writer{}", and_left(leftover.as_ref())
    )]
    DestinationChanged {
        /// The destination.
        dest: PathBuf,
        /// The staged file, if it could not be removed.
        leftover: Option<Leftover>,
    },
    /// The destination is the complete new file for every process, but its directory could not be
    /// synced. After a power loss, it is the complete old file or the complete new file.
    #[error(
        "{dest:?} was replaced, but its directory could not be synced: \
         a power loss may restore the old file; commit again{}: \
         {source}", and_left(leftover.as_ref())
    )]
    ReplacedDurabilityUnknown {
        /// The destination.
        dest: PathBuf,
        /// The error of the sync.
        source: io::Error,
        /// The name of the staged file, if it could not be removed. It refers to the new file after
        /// `no_clobber` by `link`, and to the old file after recycling.
        leftover: Option<Leftover>,
    },
    /// The destination is the new file, with the requested durability, but the name of the staged
    /// file could not be removed. It refers to the new file after `no_clobber` by `link`, and to
    /// the old file after recycling.
    #[error(
        "{dest:?} was replaced, but the name of its staged file remains; sweep the directory: \
         {source}"
    )]
    ReplacedCleanupFailed {
        /// The destination.
        dest: PathBuf,
        /// The remaining file, and why it could not be removed.
        source: Leftover,
    },
    /// The rename failed, and its outcome could not be determined: a network file system became
    /// unavailable. The destination is the complete old file or the complete new file.
    #[error(
        "{dest:?} may have been replaced: the rename failed ({rename}) and its outcome cannot be \
         read; inspect the destination once its file system is available: {source}"
    )]
    Unknown {
        /// The destination.
        dest: PathBuf,
        /// The error of the rename.
        rename: io::Error,
        /// The error of inspecting the destination.
        source: io::Error,
    },
}

fn and_left(leftover: Option<&Leftover>) -> String {
    leftover.map_or_else(String::new, |left| {
        format!("; {left} ({}): sweep the directory", left.source)
    })
}

/// An error of [`AtomicGroup::commit`](crate::AtomicGroup::commit), by the state that it leaves.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GroupCommitError {
    /// Every destination is unchanged, and the staged files were removed.
    #[error(
        "nothing was replaced: {step} failed on {path:?}{}: {source}",
        leftovers.iter().map(|left| and_left(Some(left))).collect::<String>()
    )]
    NothingReplaced {
        /// The step that failed.
        step: CommitStep,
        /// The affected destination or record.
        path: PathBuf,
        /// The error of the step.
        source: io::Error,
        /// The staged files that could not be removed.
        leftovers: Vec<Leftover>,
    },
    /// The group record is published, but some destinations may still be old. The next
    /// [`open`](crate::AtomicWriter::open) of one of them, or [`recover`](crate::recover), replaces
    /// them.
    ///
    /// If the record could not be synced, a power loss before the recovery may remove it. Every
    /// destination is then old.
    #[error(
        "the group is only partly replaced: {path:?} failed; call `recover` on the directory to \
         complete it: {source}"
    )]
    RollForwardPending {
        /// The path that failed.
        path: PathBuf,
        /// The error of the step.
        source: io::Error,
    },
    /// The group record is published, but another user has created a file at a destination, which
    /// cannot be replaced. Some destinations may be new. Recovery completes the group once that
    /// file is removed, and keeps all staged files until then.
    #[error(
        "the group is only partly replaced: {path:?} is now a file of user {owner}; remove it \
         (in a sticky directory, only that user, the directory's owner and root can) and call \
         `recover` on the directory: {source}"
    )]
    DestinationTaken {
        /// The destination.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// The error of the system.
        source: io::Error,
    },
    /// Publishing the group record failed, and its outcome could not be determined.
    /// [`recover`](crate::recover) completes or undoes the group. Until then nothing is replaced.
    #[error(
        "the group may be replaced by a recovery: publishing {record:?} failed ({rename}) and its \
         outcome cannot be read; call `recover` once the file system is available: {source}"
    )]
    Unknown {
        /// The record.
        record: PathBuf,
        /// The error of the rename.
        rename: io::Error,
        /// The error of inspecting the record.
        source: io::Error,
    },
    /// Every destination is the new file, but the directory could not be synced. The record
    /// remains, so that after a power loss a recovery replaces them again.
    #[error(
        "all files were replaced, but {dir:?} could not be synced; call `recover` to make them \
         durable: {source}"
    )]
    ReplacedDurabilityUnknown {
        /// The directory.
        dir: PathBuf,
        /// The error of the sync.
        source: io::Error,
    },
    /// Every destination is the new file, with the requested durability, but the record could not
    /// be removed durably. A recovery removes it.
    #[error(
        "all files were replaced, but the group record {record:?} could not be removed; call \
         `recover`: {source}"
    )]
    ReplacedRecordLeft {
        /// The record.
        record: PathBuf,
        /// The error of the removal.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_error_names_the_step_and_the_leftover() {
        let failed = |step, leftover| {
            CommitError::NotReplaced {
                dest: "memory".into(),
                step,
                source: io::ErrorKind::StorageFull.into(),
                leftover,
            }
            .to_string()
        };
        let left = Leftover {
            path: "the stage".into(),
            source: io::ErrorKind::ReadOnlyFilesystem.into(),
        };
        assert_eq!(
            failed(CommitStep::Sync, None),
            "\"memory\" was not replaced: syncing the staged file failed: no storage space"
        );
        let text = failed(CommitStep::Rename, Some(left));
        for part in ["renaming", "the stage", "read-only", "sweep the directory"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}
