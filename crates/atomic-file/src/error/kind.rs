//! Kinds of the errors, and their conversion to [`io::Error`].

use std::io;
use std::io::ErrorKind;

use super::commit::{CommitError, GroupCommitError, Leftover};
use super::open::{Obstacle, OpenError};
use super::recover::{RecoverError, SweepError};
use crate::attribute::NotPreserved;
use crate::group::{AddError, Ineligible};

impl OpenError {
    /// Returns the kind of the system's error, or the kind that describes the condition best.
    ///
    /// It is also the kind of the [`io::Error`] that this error converts to.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoFileName { .. }
            | Self::ReservedName { .. }
            | Self::MagicLink { .. }
            | Self::NotAFile { is_dir: false, .. } => ErrorKind::InvalidInput,
            Self::NotAFile { is_dir: true, .. } => ErrorKind::IsADirectory,
            Self::DanglingSymlink { .. } => ErrorKind::NotFound,
            Self::UntrustedSymlink { .. } => ErrorKind::PermissionDenied,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::DestinationChanged { .. } => ErrorKind::Other,
            Self::CannotReplace { obstacle, .. } => obstacle.kind(),
            Self::CrossFileSystem { .. } => ErrorKind::CrossesDevices,
            Self::NoClobberUnsupported { .. } => ErrorKind::Unsupported,
            Self::NotPreserved { source, .. } => source.source.kind(),
            Self::Leftover { source, .. } => source.source.kind(),
            Self::Recover { source, .. } => source.kind(),
            Self::OpenDirectory { source, .. }
            | Self::NotWritable { source, .. }
            | Self::Io { source, .. } => source.kind(),
        }
    }
}

impl Obstacle {
    /// Returns the kind of the error that the rename would have.
    fn kind(self) -> ErrorKind {
        match self {
            Self::MountPoint => ErrorKind::ResourceBusy,
            Self::Immutable
            | Self::AppendOnly
            | Self::Swap
            | Self::ImmutableDirectory
            | Self::AppendOnlyDirectory
            | Self::OthersInStickyDirectory { .. } => ErrorKind::PermissionDenied,
        }
    }
}

impl CommitError {
    /// Returns the kind of the system's error; [`Other`](ErrorKind::Other) for
    /// [`DestinationChanged`](Self::DestinationChanged).
    ///
    /// It is also the kind of the [`io::Error`] that this error converts to.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotReplaced { source, .. } | Self::ReplacedDurabilityUnknown { source, .. } => {
                source.kind()
            }
            Self::DestinationChanged { .. } => ErrorKind::Other,
            Self::ReplacedCleanupFailed { source, .. } => source.source.kind(),
            Self::Unknown { rename, .. } => rename.kind(),
        }
    }

    /// Returns whether this commit replaced the destination; `None` if that is unknown.
    ///
    /// `Some(true)` makes no statement about durability: after
    /// [`ReplacedDurabilityUnknown`](Self::ReplacedDurabilityUnknown), a power loss may restore the
    /// old file.
    ///
    /// # Examples
    /// ```
    /// use atomic_file::AtomicWriter;
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("config.toml");
    ///
    /// let writer = AtomicWriter::options().no_clobber(true).open(&dest)?;
    /// std::fs::write(&dest, "of another program")?;
    /// let error = writer.commit().unwrap_err();
    /// assert_eq!(error.replaced(), Some(false));
    /// assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn replaced(&self) -> Option<bool> {
        match self {
            Self::NotReplaced { .. } | Self::DestinationChanged { .. } => Some(false),
            Self::ReplacedDurabilityUnknown { .. } | Self::ReplacedCleanupFailed { .. } => {
                Some(true)
            }
            Self::Unknown { .. } => None,
        }
    }
}

impl GroupCommitError {
    /// Returns the kind of the system's error.
    ///
    /// It is also the kind of the [`io::Error`] that this error converts to.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NothingReplaced { source, .. }
            | Self::RollForwardPending { source, .. }
            | Self::DestinationTaken { source, .. }
            | Self::ReplacedDurabilityUnknown { source, .. }
            | Self::ReplacedRecordLeft { source, .. } => source.kind(),
            Self::Unknown { rename, .. } => rename.kind(),
        }
    }

    /// Returns whether this commit replaced all destinations or none; `None` if it is unknown or if
    /// only some may be replaced until a [recovery](crate::recover()).
    #[must_use]
    pub fn replaced(&self) -> Option<bool> {
        match self {
            Self::NothingReplaced { .. } => Some(false),
            Self::ReplacedDurabilityUnknown { .. } | Self::ReplacedRecordLeft { .. } => Some(true),
            Self::RollForwardPending { .. }
            | Self::DestinationTaken { .. }
            | Self::Unknown { .. } => None,
        }
    }
}

impl RecoverError {
    /// Returns the kind of the system's error, or the kind that describes the condition best.
    ///
    /// It is also the kind of the [`io::Error`] that this error converts to.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Damaged { .. } | Self::StageChanged { .. } => ErrorKind::InvalidData,
            Self::DestinationIsDirectory { .. } => ErrorKind::IsADirectory,
            Self::DestinationTaken { .. } => ErrorKind::PermissionDenied,
            Self::Stuck { first, .. } => first.kind(),
            Self::StagesLost { .. } => ErrorKind::NotFound,
            Self::Sweep(error) => error.source.kind(),
            Self::Io { source, .. } => source.kind(),
        }
    }
}

impl Ineligible {
    fn kind(self) -> ErrorKind {
        match self {
            Self::OtherDirectory
            | Self::StagedElsewhere
            | Self::SameDestination
            | Self::NoClobber
            | Self::ReplaceOnly
            | Self::SameFile
            | Self::TooManyMembers => ErrorKind::InvalidInput,
            Self::NoLocks | Self::NoGenerations | Self::NoInodeNumbers => ErrorKind::Unsupported,
        }
    }
}

/// Implements the conversion to an [`io::Error`] of the same kind that contains the error.
macro_rules! into_io_error {
    ($($error:ty: $kind:expr;)*) => {$(
        /// Keeps the kind. [`io::Error::get_ref`] and [`io::Error::downcast`] return the error.
        impl From<$error> for io::Error {
            fn from(error: $error) -> Self {
                let kind: fn(&$error) -> ErrorKind = $kind;
                Self::new(kind(&error), error)
            }
        }
    )*};
}

into_io_error! {
    OpenError: OpenError::kind;
    CommitError: CommitError::kind;
    GroupCommitError: GroupCommitError::kind;
    RecoverError: RecoverError::kind;
    SweepError: |error| error.source.kind();
    Leftover: |error| error.source.kind();
    NotPreserved: |error| error.source.kind();
    AddError: |error| error.reason.kind();
}

#[cfg(test)]
mod tests;
