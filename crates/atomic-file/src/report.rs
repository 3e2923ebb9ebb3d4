//! Reports of recoveries and sweeps.

use std::io;
use std::path::PathBuf;

/// The result of [`recover`](crate::recover()).
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct RecoverReport {
    /// Destinations that this call replaced.
    pub completed: Vec<PathBuf>,
    /// Destinations that were replaced before the process was killed.
    pub in_place: Vec<PathBuf>,
    /// Destinations that a later commit by the group's user or root replaced. The file of that
    /// commit stays, and the group's file was removed.
    pub superseded: Vec<PathBuf>,
    /// Destinations of abandoned groups: all of a group's staged files are missing, and every
    /// destination is still the old file. If only some staged files of a group are missing,
    /// recovery fails with [`RecoverError::StagesLost`](crate::RecoverError::StagesLost).
    pub lost: Vec<PathBuf>,
    /// Whether a running process is committing a group in the directory. That group is not changed.
    pub busy: bool,
    /// Group records that a power loss had torn, and that were removed. Their groups were committed
    /// without syncs ([`Durability::None`](crate::Durability::None)), so some of their files may be
    /// old and some new.
    pub discarded: Vec<PathBuf>,
    /// Files with the name of a group record that were ignored, because another user created them
    /// or may have.
    pub foreign: Vec<PathBuf>,
    /// The result of the sweep, which includes the staged files of unpublished groups.
    pub swept: SweepReport,
}

/// The result of [`sweep`](crate::sweep()).
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct SweepReport {
    /// Orphaned staged files that were removed.
    pub removed: Vec<PathBuf>,
    /// Staged files in use by this or another process. They were not changed.
    pub in_use: Vec<PathBuf>,
    /// Recycled files (see [`AtomicWriterOptions::recycle`](crate::AtomicWriterOptions::recycle))
    /// that were removed. The next writer creates a new file.
    pub recycled: Vec<PathBuf>,
    /// Files with the name of a staged file that were not removed for another reason.
    pub skipped: Vec<Skipped>,
}

/// A directory entry with the name of a staged file that was not removed.
#[derive(Debug)]
#[non_exhaustive]
pub struct Skipped {
    /// Its path.
    pub path: PathBuf,
    /// The reason: no permission to open it, no locks on its file system, a pending group
    /// commit, or not a regular file.
    pub reason: io::Error,
}
