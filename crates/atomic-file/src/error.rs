//! The errors: one type per operation, each naming the path it is about.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::preserve::NotPreserved;
use crate::recover::RecoverReport;
use crate::writer::AtomicWriter;

/// Why nothing was staged. The destination is as it was, and nothing was left behind but what the error names.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path ends in `/`, `.` or `..`, or is empty.
    #[error("{path:?} does not name a file: give a path that ends in a file name")]
    NoFileName {
        /// The path given.
        path: PathBuf,
    },
    /// The name is one that this crate gives to staged files or group records: a sweep would remove what is committed there, or
    /// a recovery read it.
    #[error("{path:?} is a name for staged files and group records: choose another")]
    ReservedName {
        /// The destination, or where its link leads to.
        path: PathBuf,
    },
    /// The destination's directory, or the staging directory, cannot be opened.
    #[error("cannot open the directory {path:?}: it must exist and be readable and writable")]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, device, FIFO or socket stands at the destination.
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
    /// The destination is a symbolic link that leads nowhere.
    #[error(
        "{path:?} is a symbolic link to {target:?}, which does not exist (a disk not mounted?): \
         create the target, or replace the link itself with `Symlinks::Replace`"
    )]
    DanglingSymlink {
        /// The destination.
        path: PathBuf,
        /// Where the last link leads to, as the link says it.
        target: PathBuf,
    },
    /// The destination is a symbolic link in a directory that [others may write
    /// to](crate::others_may_write), and one that another user may have put there.
    #[error(
        "{path:?} is a symbolic link of user {owner}, in a directory where others may put some: \
         name its target, or replace the link itself with `Symlinks::Replace`"
    )]
    UntrustedSymlink {
        /// The link.
        path: PathBuf,
        /// The user id of the link's owner.
        owner: u32,
    },
    /// The destination exists, and [`no_clobber`](crate::Options::no_clobber) was asked for.
    #[error(
        "{path:?} exists already, and replacing it was ruled out by `no_clobber`: choose another name, or remove it"
    )]
    AlreadyExists {
        /// The destination.
        path: PathBuf,
    },
    /// The destination is not the version to [replace only](crate::Options::replace_only).
    #[error(
        "{path:?} was replaced, removed or written to by another writer since it was read: it is as that writer left it; \
         read it again"
    )]
    DestinationChanged {
        /// The destination.
        path: PathBuf,
    },
    /// The rename of the commit cannot succeed.
    #[error("{path:?} cannot be replaced: {obstacle}")]
    CannotReplace {
        /// The destination.
        path: PathBuf,
        /// What stands in the way.
        obstacle: Obstacle,
    },
    /// The new file cannot get what the replaced one has, and [`preserve`](crate::Options::preserve)
    /// asks for it.
    #[error(
        "{path:?} would lose its {}: open it without preserving that, or with `Preserve::if_permitted`",
        source.attribute
    )]
    NotPreserved {
        /// The destination.
        path: PathBuf,
        /// Which attribute, and what the system said.
        source: NotPreserved,
    },
    /// No file can be created in the destination's directory, or in the staging directory.
    #[error(
        "cannot stage a file for {path:?}: no file can be created in {dir:?}; get write permission \
         there, mount its file system writable, or choose another directory"
    )]
    NotWritable {
        /// The destination.
        path: PathBuf,
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The staging directory is on another file system than the destination.
    #[error(
        "cannot stage in {staging_dir:?}: {dest_dir:?} is on another file system, and no rename leads there; \
         stage in a directory of the same mount"
    )]
    CrossFileSystem {
        /// The destination's directory.
        dest_dir: PathBuf,
        /// The staging directory.
        staging_dir: PathBuf,
    },
    /// The file system can neither rename without replacing nor make hard links.
    #[error(
        "the file system of {path:?} cannot put a file in place without replacing: open without `no_clobber`"
    )]
    NoClobberUnsupported {
        /// The destination.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The empty file with which the commit was rehearsed (for `no_clobber` or `staging_dir`) could not be removed.
    #[error("cannot remove the file with which replacing {path:?} was tried out")]
    Leftover {
        /// The destination.
        path: PathBuf,
        /// What was left, and why.
        source: Leftover,
    },
    /// A group commit left behind in the destination's directory by a killed process could not be completed.
    #[error("cannot complete the group commit found in the directory of {path:?}")]
    Recover {
        /// The destination.
        path: PathBuf,
        /// Why not.
        source: RecoverError,
    },
    /// Any other failure of a system call.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What failed, as a verb: `inspect`, say.
        operation: &'static str,
        /// What it failed on.
        path: PathBuf,
        /// What the system said.
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

/// Why a rename onto the destination cannot succeed, as far as that is known in advance.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// Something is mounted at the destination.
    #[error("something is mounted there; unmount it, or name the file that is mounted")]
    MountPoint,
    /// The destination is immutable.
    #[error("it is immutable; clear the attribute with `chattr -i` (macOS: `chflags nouchg`)")]
    Immutable,
    /// The destination can only be appended to.
    #[error("it is append-only; clear the attribute with `chattr -a` (macOS: `chflags nouappnd`)")]
    AppendOnly,
    /// The destination is in use as swap space.
    #[error("it is in use as swap space; take it out of use with `swapoff`")]
    Swap,
    /// The destination's directory, or the staging directory, is immutable.
    #[error(
        "its directory, or the staging directory, is immutable; clear the attribute with `chattr -i`"
    )]
    ImmutableDirectory,
    /// Files in the destination's directory, or in the staging directory, can be created but not
    /// renamed.
    #[error(
        "its directory, or the staging directory, is append-only; clear the attribute with `chattr -a`"
    )]
    AppendOnlyDirectory,
    /// The destination is another user's, and so is its directory, which is sticky.
    #[error(
        "it belongs to user {owner}, and its directory is sticky: only that user, the directory's \
         owner and root can replace it; choose another name"
    )]
    OthersInStickyDirectory {
        /// The user id of the destination's owner.
        owner: u32,
    },
}

/// A staged file that could not be removed. It is dead: [`sweep`](crate::sweep) removes it, and so does the next writer to the same
/// destination, unless it is the empty file of a rehearsal ([`OpenError::Leftover`]).
#[derive(Debug, Error)]
#[error("the staged file {path:?} could not be removed")]
pub struct Leftover {
    /// The staged file.
    pub path: PathBuf,
    /// Why it could not be removed.
    pub source: io::Error,
}

/// What a failed commit was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitStep {
    /// Looking for group commits that killed processes left behind in the directory, and completing
    /// them.
    Recover,
    /// Making sure that the stage's name still means the file that was written.
    Check,
    /// Writing and syncing the group's intent record.
    Record,
    /// Setting the mode and the preserved attributes of the staged file.
    Attributes,
    /// Bringing the file's bytes to the medium.
    Sync,
    /// Comparing the destination with the version to [replace only](crate::Options::replace_only),
    /// under its lock.
    Compare,
    /// Renaming the staged file.
    Rename,
}

impl fmt::Display for CommitStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recover => "looking for group commits left behind in the directory",
            Self::Check => "finding the staged file",
            Self::Record => "writing the group's intent record",
            Self::Attributes => "setting the mode and attributes of the staged file",
            Self::Sync => "syncing the staged file",
            Self::Compare => "comparing it with the file that was read",
            Self::Rename => "renaming the staged file",
        })
    }
}

/// Why [`commit`](AtomicWriter::commit) failed, by what holds now.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The destination is what it was, and the staged file is gone. Open a new writer to try again.
    ///
    /// With `no_clobber`, a source of the kind [`AlreadyExists`](io::ErrorKind::AlreadyExists) means that the
    /// destination came into being since the writer was opened.
    #[error("{dest:?} was not replaced, {step} failed{}", and_left(leftover.as_ref()))]
    NotReplaced {
        /// The destination.
        dest: PathBuf,
        /// What failed.
        step: CommitStep,
        /// How it failed.
        source: io::Error,
        /// Set where the staged file could not even be removed.
        leftover: Option<Leftover>,
    },
    /// The destination is not the version to [replace only](crate::Options::replace_only) any more. It
    /// is as the other writer left it, and the staged file is gone.
    #[error(
        "{dest:?} was not replaced: another writer replaced, removed or wrote to it since it was read; it is as that writer \
         left it; read it again{}", and_left(leftover.as_ref())
    )]
    DestinationChanged {
        /// The destination.
        dest: PathBuf,
        /// Set where the staged file could not even be removed.
        leftover: Option<Leftover>,
    },
    /// The destination is the new file, whole, for every process; whether it still is after a power loss is unknown,
    /// as the directory could not be synced. Either the old or the new file will be there, whole.
    #[error(
        "{dest:?} was replaced, but its directory could not be synced: \
         a power loss may bring the old file back; commit again to be sure{}", and_left(leftover.as_ref())
    )]
    ReplacedDurabilityUnknown {
        /// The destination.
        dest: PathBuf,
        /// Why the directory could not be synced.
        source: io::Error,
        /// Set where the stage's name could not be removed: `no_clobber` by `link` leaves it to the new file, recycling to the
        /// old one.
        leftover: Option<Leftover>,
    },
    /// The destination is the new file, as durable as was asked for, but the stage's name could not be removed: `no_clobber` by
    /// `link` leaves it to the new file, recycling to the old one.
    #[error("{dest:?} was replaced, but its staged name was left behind; sweep the directory")]
    ReplacedStageLeft {
        /// The destination.
        dest: PathBuf,
        /// What was left, and why.
        source: Leftover,
    },
    /// The rename failed and so did looking for its outcome: a network file system that went away. The destination is
    /// the old file or the new one, whole.
    #[error(
        "whether {dest:?} was replaced is unknown: renaming failed ({rename}) and the outcome cannot be read; \
         look at the destination once its file system answers again"
    )]
    Unknown {
        /// The destination.
        dest: PathBuf,
        /// What the rename said.
        rename: io::Error,
        /// What looking at the destination said.
        source: io::Error,
    },
}

fn and_left(leftover: Option<&Leftover>) -> String {
    leftover.map_or_else(String::new, |left| {
        format!("; {left} ({}): sweep the directory", left.source)
    })
}

/// Why a writer was not taken into an [`AtomicGroup`](crate::AtomicGroup). Hands the writer back.
#[derive(Debug, Error)]
#[error("{:?} cannot join the group: {refusal}", writer.dest_path())]
pub struct AddError {
    /// Why.
    pub refusal: Refusal,
    /// The writer, as it was.
    pub writer: Box<AtomicWriter>,
}

/// Why a writer cannot be a member of a group.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// It is staged in another directory than the group's first member.
    #[error("it is staged in another directory than the members; a group lives in one directory")]
    OtherDirectory,
    /// It is staged elsewhere than in the directory of its destination.
    #[error("it is staged elsewhere than beside its destination; open it without `staging_dir`")]
    StagedElsewhere,
    /// A member has the same destination.
    #[error("another member has the same destination")]
    SameDestination,
    /// It was opened with `no_clobber`.
    #[error(
        "a promise not to replace cannot be kept by a recovery after a crash; open it without `no_clobber`"
    )]
    NoClobber,
    /// It was opened with `replace_only`.
    #[error(
        "a promise to replace one version only cannot be kept by a recovery after a crash; open it without `replace_only`"
    )]
    ReplaceOnly,
    /// The file system has no working `flock`.
    #[error(
        "its file system cannot lock files, and recovery could not tell a dead group from a living one"
    )]
    NoLocks,
    /// The destination's name differs from a member's in the case of its letters only, and the directory
    /// does not distinguish case; or both names mean one file there.
    #[error(
        "the name of another member means the same file: the directory does not distinguish upper \
         and lower case"
    )]
    SameFile,
    /// The group has so many members that its record would be too long for recoveries to read.
    #[error("the group has too many members for its record; commit it in parts")]
    TooManyMembers,
    /// The file system tells neither when a file was created nor gives it a handle, so that a recovery
    /// could take a file committed later for one that was there before.
    #[error(
        "its file system gives files neither a time of creation nor a handle, and recovery could \
         undo a later commit; commit the files one by one"
    )]
    NoGenerations,
    /// The file system keeps no inode numbers from mount to mount (FAT, exFAT), or may not (FUSE).
    #[error(
        "its file system may not keep inode numbers, and recovery could not recognise the staged files"
    )]
    NoInodeNumbers,
}

/// Why [`AtomicGroup::commit`](crate::AtomicGroup::commit) failed, by what holds now.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GroupCommitError {
    /// Every destination is what it was, and the staged files are gone.
    #[error("nothing was replaced, {step} failed on {path:?}{}", leftovers.iter().map(|left| and_left(Some(left))).collect::<String>())]
    NothingReplaced {
        /// What failed.
        step: CommitStep,
        /// The destination or record that it failed on.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
        /// The staged files that could not even be removed.
        leftovers: Vec<Leftover>,
    },
    /// The intent record stands, but not everything was done: some destinations may be new already. The next
    /// [`open`](AtomicWriter::open) in the directory, or [`recover`](crate::recover), replaces the others.
    ///
    /// Where the record itself could not be synced, a power loss before that may take it away; then every destination
    /// is the old one.
    #[error(
        "the group is not all replaced yet, {path:?} failed: recovery will complete it; call `recover` on the directory"
    )]
    WillBeCompleted {
        /// What it stopped at.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// The intent record stands, but another user has put a file at a destination, which cannot be
    /// replaced. Some destinations may be new already. Recovery completes the group once that file
    /// is removed, and keeps all staged files until then.
    #[error(
        "the group is not all replaced yet: {path:?} is now a file of user {owner}; remove it \
         (in a sticky directory, only that user, the directory's owner and root can) and call \
         `recover` on the directory"
    )]
    DestinationTaken {
        /// The destination.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// What the system said.
        source: io::Error,
    },
    /// Whether the intent record stands is unknown: renaming it failed, and so did looking for the outcome.
    /// [`recover`](crate::recover) will complete the group or undo it; until then nothing is replaced.
    #[error(
        "whether the group will be replaced is unknown: publishing {record:?} failed ({rename}) and the outcome \
         cannot be read; call `recover` once the file system answers again"
    )]
    Unknown {
        /// The record.
        record: PathBuf,
        /// What the rename said.
        rename: io::Error,
        /// What looking at the record said.
        source: io::Error,
    },
    /// Every destination is the new file, but the directory could not be synced. The record stays, so that after a power
    /// loss recovery still makes them all new.
    #[error(
        "all was replaced, but {dir:?} could not be synced: recovery will make it durable; call `recover`"
    )]
    ReplacedDurabilityUnknown {
        /// The directory.
        dir: PathBuf,
        /// Why it could not be synced.
        source: io::Error,
    },
    /// Every destination is the new file, as durable as was asked for; only the record could not be removed for good.
    /// Recovery will do so.
    #[error(
        "all was replaced, but the intent record {record:?} could not be removed; call `recover`"
    )]
    ReplacedRecordLeft {
        /// The record.
        record: PathBuf,
        /// Why it could not be removed.
        source: io::Error,
    },
}

/// Why a group commit left behind by a killed process could not be completed. Nothing is guessed at: the record and
/// the staged files it names stay. Only writers to the group's own destinations are held up by it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecoverError {
    /// The record is not one, or not whole, or of a version this one does not know.
    #[error(
        "the group's intent record {path:?} is damaged ({problem}): some files of the group may be old and some new; \
         look at them, remove the record, then sweep the directory"
    )]
    Damaged {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A member's destination is a directory now.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: {dest:?} is a directory now; \
         move it away and call `recover`, or remove the record to give the group up"
    )]
    DestinationIsDirectory {
        /// The destination.
        dest: PathBuf,
        /// The record.
        record: PathBuf,
    },
    /// Another user has put a file at a member's destination since the group was published.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: {dest:?} is now a file of \
         user {owner}; remove it and call `recover`, or remove the record to give the group up"
    )]
    DestinationTaken {
        /// The destination.
        dest: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// The record.
        record: PathBuf,
    },
    /// Groups that could not be completed. All others were, and the directory was swept.
    #[error(
        "{} in {dir:?} could not be completed",
        match others.len() { 0 => "a group commit".into(), others => format!("{} group commits", others + 1) }
    )]
    Stuck {
        /// The directory.
        dir: PathBuf,
        /// Why one of them could not.
        #[source]
        first: Box<RecoverError>,
        /// Why the others could not.
        others: Vec<RecoverError>,
        /// What was done.
        report: Box<RecoverReport>,
    },
    /// The name of a member's staged file means another file now.
    #[error(
        "{stage:?} is not the file that the group staged for {dest:?}, so it was not renamed: \
         was the directory copied? Remove {record:?} once the files are as they should be"
    )]
    StageChanged {
        /// The staged file.
        stage: PathBuf,
        /// The destination it was meant for.
        dest: PathBuf,
        /// The record.
        record: PathBuf,
    },
    /// Staged files of a published group are gone, though their destinations were not replaced by
    /// them: somebody removed them. The group's other files are left as they are.
    #[error(
        "the group commit recorded in {record:?} cannot be completed: the staged files for {lost:?} \
         are gone; already new are {in_place:?}, still staged {staged:?}. Bring the destinations to \
         one state, remove the record, then sweep the directory"
    )]
    StagesLost {
        /// The destinations whose staged files are gone, and which are as they were before the group.
        lost: Vec<PathBuf>,
        /// The destinations that are as they were before the group and could still be replaced.
        staged: Vec<PathBuf>,
        /// The destinations that are the group's new files.
        in_place: Vec<PathBuf>,
        /// The record.
        record: PathBuf,
    },
    /// The record was completed or there was none, but dead stages could not be swept.
    #[error("the group is settled, but dead stages remain")]
    Sweep(#[from] SweepError),
    /// A system call failed. Calling again goes on where it stopped.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What failed, as a verb.
        operation: &'static str,
        /// What it failed on.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a directory could not be swept.
#[derive(Debug, Error)]
#[error("cannot {operation} the directory {path:?}")]
#[non_exhaustive]
pub struct SweepError {
    /// What failed, as a verb.
    pub operation: &'static str,
    /// The directory.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_failed_says_at_what_and_what_it_left() {
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
            "\"memory\" was not replaced, syncing the staged file failed"
        );
        let text = failed(CommitStep::Rename, Some(left));
        for part in ["renaming", "the stage", "read-only", "sweep the directory"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}
