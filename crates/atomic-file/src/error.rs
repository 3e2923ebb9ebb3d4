//! Error types: one per operation, each naming the affected path.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::attribute::NotPreserved;
use crate::report::RecoverReport;

/// An error of opening a writer. The destination is unchanged, and no file is left behind except
/// those that the error names.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path ends in `/`, `.` or `..`, or is empty.
    #[error("{path:?} does not name a file: give a path that ends in a file name")]
    NoFileName {
        /// The path given.
        path: PathBuf,
    },
    /// The name is reserved for staged files and group records: a sweep would remove such a file,
    /// or a recovery read it.
    #[error("{path:?} is reserved for staged files and group records: choose another name")]
    ReservedName {
        /// The destination, or where its link leads to.
        path: PathBuf,
    },
    /// The destination's directory, or the staging directory, cannot be opened.
    #[error("cannot open the directory {path:?}: it must exist and be readable and writable")]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The destination is a directory, device, FIFO or socket.
    #[error(
        "{path:?} is {}: only a regular file can be replaced",
        if *is_dir { "a directory" } else { "a device, FIFO or socket" }
    )]
    NotAFile {
        /// The destination.
        path: PathBuf,
        /// Whether it is a directory.
        is_dir: bool,
    },
    /// The destination is a dangling symbolic link.
    #[error(
        "{path:?} is a symbolic link to {target:?}, which does not exist (a disk not mounted?): \
         create the target, or replace the link itself with `Symlinks::Replace`"
    )]
    DanglingSymlink {
        /// The destination.
        path: PathBuf,
        /// The target of the last link, as stored in the link.
        target: PathBuf,
    },
    /// The destination is a symbolic link in a directory that [others may write
    /// to](crate::others_may_write), and another user may have created it.
    #[error(
        "{path:?} is a symbolic link of user {owner}, in a directory where others may create \
         links: name its target, or replace the link itself with `Symlinks::Replace`"
    )]
    UntrustedSymlink {
        /// The link.
        path: PathBuf,
        /// The user id of the link's owner.
        owner: u32,
    },
    /// The destination exists, and [`no_clobber`](crate::Options::no_clobber) is set.
    #[error("{path:?} exists, and `no_clobber` is set: choose another name, or remove it")]
    AlreadyExists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is not the version to [replace](crate::Options::replace_only).
    #[error(
        "{path:?} was replaced, removed or written to by another writer since it was read: \
         read it again and open a new writer"
    )]
    DestinationChanged {
        /// The destination.
        path: PathBuf,
    },
    /// The rename of the commit would fail.
    #[error("{path:?} cannot be replaced: {obstacle}")]
    CannotReplace {
        /// The destination.
        path: PathBuf,
        /// The reason.
        obstacle: Obstacle,
    },
    /// The new file cannot receive an attribute of the replaced file that
    /// [`preserve`](crate::Options::preserve) requests.
    #[error(
        "{path:?} would lose its {}: open it without preserving that, or with \
         `Preserve::if_permitted`",
        source.attribute
    )]
    NotPreserved {
        /// The destination.
        path: PathBuf,
        /// The attribute and the error of the system.
        source: NotPreserved,
    },
    /// No file can be created in the destination's directory or in the staging directory.
    #[error(
        "cannot stage a file for {path:?}: no file can be created in {dir:?}; grant write \
         permission for it, mount its file system writable, or choose another directory"
    )]
    NotWritable {
        /// The destination.
        path: PathBuf,
        /// The directory.
        dir: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The staging directory is on another file system than the destination.
    #[error(
        "cannot stage in {staging_dir:?}: {dest_dir:?} is on another file system; \
         stage in a directory of the same mount"
    )]
    CrossFileSystem {
        /// The destination's directory.
        dest_dir: PathBuf,
        /// The staging directory.
        staging_dir: PathBuf,
    },
    /// The file system supports neither a rename without replacing nor hard links.
    #[error(
        "the file system of {path:?} cannot rename without replacing: open without `no_clobber`"
    )]
    NoClobberUnsupported {
        /// The destination.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The empty file of the preflight (for `no_clobber` or `staging_dir`) could not be removed.
    #[error(
        "cannot remove the file that checked whether {path:?} can be replaced: sweep the directory"
    )]
    Leftover {
        /// The destination.
        path: PathBuf,
        /// The remaining file, and why it could not be removed.
        source: Leftover,
    },
    /// A group commit of a killed process in the destination's directory could not be completed.
    #[error("cannot complete the group commit pending in the directory of {path:?}")]
    Recover {
        /// The destination.
        path: PathBuf,
        /// The error of the recovery.
        source: RecoverError,
    },
    /// Any other failure of a system call.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// The failed operation, as a verb such as `inspect`.
        operation: &'static str,
        /// The affected path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

/// A condition, detected by `open`, that makes the rename onto the destination fail.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// The destination is a mount point.
    #[error("it is a mount point; unmount it, or give the path of the mounted file")]
    MountPoint,
    /// The destination is immutable.
    #[error("it is immutable; clear the attribute with `chattr -i` (macOS: `chflags nouchg`)")]
    Immutable,
    /// The destination is append-only.
    #[error("it is append-only; clear the attribute with `chattr -a` (macOS: `chflags nouappnd`)")]
    AppendOnly,
    /// The destination is in use as swap space.
    #[error("it is in use as swap space; disable it with `swapoff`")]
    Swap,
    /// The destination's directory, or the staging directory, is immutable.
    #[error(
        "its directory, or the staging directory, is immutable; clear the attribute with `chattr \
         -i`"
    )]
    ImmutableDirectory,
    /// The destination's directory, or the staging directory, is append-only: its files cannot be
    /// renamed.
    #[error(
        "its directory, or the staging directory, is append-only; clear the attribute with \
         `chattr -a`"
    )]
    AppendOnlyDirectory,
    /// The destination and its directory belong to other users, and the directory is sticky.
    #[error(
        "it belongs to user {owner}, and its directory is sticky: only that user, the directory's \
         owner and root can replace it; choose another name"
    )]
    OthersInStickyDirectory {
        /// The user id of the destination's owner.
        owner: u32,
    },
}

/// A staged file that could not be removed.
///
/// It is orphaned: [`sweep`](crate::sweep) removes it, and so does the next writer to the same
/// destination, unless it is the empty file of a preflight
/// ([`OpenError::Leftover`](crate::OpenError::Leftover)).
#[derive(Debug, Error)]
#[error("the staged file {path:?} could not be removed")]
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
    /// Writing and syncing the group record.
    Record,
    /// Setting the mode and the preserved attributes of the staged file.
    Attributes,
    /// Syncing the bytes of the staged file.
    Sync,
    /// Comparing the destination with the version to [replace](crate::Options::replace_only), under
    /// its lock.
    Compare,
    /// Renaming the staged file.
    Rename,
}

impl fmt::Display for CommitStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recover => "completing the group commits pending in the directory",
            Self::Check => "finding the staged file",
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
    #[error("{dest:?} was not replaced: {step} failed{}", and_left(leftover.as_ref()))]
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
    /// The destination is no longer the version to [replace](crate::Options::replace_only). It is
    /// unchanged, and the staged file was removed.
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
         a power loss may restore the old file; commit again{}", and_left(leftover.as_ref())
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
    #[error("{dest:?} was replaced, but the name of its staged file remains; sweep the directory")]
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
         read; inspect the destination once its file system is available"
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
        "nothing was replaced: {step} failed on {path:?}{}",
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
    /// [`open`](crate::AtomicWriter::open) in the directory, or [`recover`](crate::recover),
    /// replaces them.
    ///
    /// If the record could not be synced, a power loss before the recovery may remove it. Every
    /// destination is then old.
    #[error(
        "the group is only partly replaced: {path:?} failed; call `recover` on the directory to \
         complete it"
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
         `recover` on the directory"
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
         outcome cannot be read; call `recover` once the file system is available"
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
         durable"
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
         `recover`"
    )]
    ReplacedRecordLeft {
        /// The record.
        record: PathBuf,
        /// The error of the removal.
        source: io::Error,
    },
}

/// An error of completing the group commit of a killed process.
///
/// Recovery never guesses: the record and the staged files that it names remain. Only writers to
/// the group's own destinations are blocked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// The record is invalid, incomplete, or of an unknown version.
    #[error(
        "the group record {path:?} is damaged ({problem}): some files of the group may be old and \
         some new; inspect them, remove the record, then sweep the directory"
    )]
    Damaged {
        /// The record.
        path: PathBuf,
        /// The kind of damage.
        problem: &'static str,
    },
    /// A member's destination is a directory now.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: {dest:?} is a directory now; \
         move it away and call `recover`, or remove the record to abandon the group"
    )]
    DestinationIsDirectory {
        /// The destination.
        dest: PathBuf,
        /// The record.
        record: PathBuf,
    },
    /// Another user has created a file at a member's destination since the group was published.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: {dest:?} is now a file of \
         user {owner}; remove it and call `recover`, or remove the record to abandon the group"
    )]
    DestinationTaken {
        /// The destination.
        dest: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// The record.
        record: PathBuf,
    },
    /// Some groups could not be completed. All other groups were completed, and the directory was
    /// swept.
    #[error(
        "{} in {dir:?} could not be completed",
        match others.len() {
            0 => "a group commit".into(),
            others => format!("{} group commits", others + 1),
        }
    )]
    Stuck {
        /// The directory.
        dir: PathBuf,
        /// The error of one group.
        #[source]
        first: Box<RecoverError>,
        /// The errors of the other groups.
        others: Vec<RecoverError>,
        /// The result for the other groups.
        report: Box<RecoverReport>,
    },
    /// The name of a member's staged file refers to another file.
    #[error(
        "{stage:?} is not the file that the group staged for {dest:?}, so it was not renamed \
         (the directory may be a copy): bring the files to one state, then remove {record:?}"
    )]
    StageChanged {
        /// The staged file.
        stage: PathBuf,
        /// Its destination.
        dest: PathBuf,
        /// The record.
        record: PathBuf,
    },
    /// Staged files of a published group were removed before they replaced their destinations. The
    /// other files of the group are unchanged.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: the staged files for \
         {lost:?} are missing; {in_place:?} are new, {staged:?} are staged: bring the destinations \
         to one state, remove the record, then sweep the directory"
    )]
    StagesLost {
        /// The old destinations whose staged files are missing.
        lost: Vec<PathBuf>,
        /// The old destinations whose staged files remain.
        staged: Vec<PathBuf>,
        /// The destinations that are the group's new files.
        in_place: Vec<PathBuf>,
        /// The record.
        record: PathBuf,
    },
    /// No group is pending any more, but orphaned staged files could not be swept.
    #[error("all groups are complete, but orphaned staged files remain")]
    Sweep(#[from] SweepError),
    /// A system call failed. Calling again resumes the recovery.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// The failed operation, as a verb.
        operation: &'static str,
        /// The affected path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

/// An error of sweeping a directory.
#[derive(Debug, Error)]
#[error("cannot {operation} the directory {path:?}")]
#[non_exhaustive]
pub struct SweepError {
    /// The failed operation, as a verb.
    pub operation: &'static str,
    /// The directory.
    pub path: PathBuf,
    /// The error of the system.
    pub source: io::Error,
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
            "\"memory\" was not replaced: syncing the staged file failed"
        );
        let text = failed(CommitStep::Rename, Some(left));
        for part in ["renaming", "the stage", "read-only", "sweep the directory"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}
