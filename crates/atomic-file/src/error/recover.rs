//! Errors of recoveries and sweeps.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::report::RecoverReport;

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
        "{} in {dir:?} could not be completed: {first}",
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
    #[error("all groups are complete, but orphaned staged files remain: {0}")]
    Sweep(#[from] SweepError),
    /// A system call failed. Calling again resumes the recovery.
    #[error("cannot {operation} {path:?}: {source}")]
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
#[error("cannot {operation} the directory {path:?}: {source}")]
#[non_exhaustive]
pub struct SweepError {
    /// The failed operation, as a verb.
    pub operation: &'static str,
    /// The directory.
    pub path: PathBuf,
    /// The error of the system.
    pub source: io::Error,
}
