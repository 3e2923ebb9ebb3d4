//! Errors of epochs.

use thiserror::Error;

use crate::geometry::GeometryError;

/// An error for an epoch that could not begin. No mark was taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BeginEpochError {
    /// Another epoch of this bitmap is open: it is not released, dropped or reclaimed.
    #[error(
        "another epoch of this bitmap is open: release or drop it first; if it was leaked or its \
         save is stuck, call reclaim_epoch, which marks its pages dirty again"
    )]
    AlreadyOpen,
    /// Memory for the marks can't be allocated.
    #[error("failed to take the marks out of the bitmap: {0}")]
    OutOfMemory(#[source] GeometryError),
}

/// An error for an epoch that could not be extended. No mark was taken.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtendError {
    /// The epoch was reclaimed.
    #[error(transparent)]
    Reclaimed(#[from] EpochReclaimed),
    /// Memory for the marks can't be allocated.
    #[error("failed to take the marks out of the bitmap: {0}")]
    OutOfMemory(#[from] GeometryError),
}

/// An error for an epoch that was reclaimed while its save ran. Its marks are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the epoch was reclaimed while its save ran, and its pages are dirty again: \
     discard this save, and save the pages with the next one"
)]
#[non_exhaustive]
pub struct EpochReclaimed;

/// An error for an epoch that got marks after it was checked that its pages were written. Its marks
/// are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the epoch was extended after its check, and its pages are dirty again: write the pages of each \
     extension, and check the epoch after that"
)]
#[non_exhaustive]
pub struct EpochExtended;

/// An error for an epoch whose marks were not discarded. They are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotReleased {
    /// The epoch was reclaimed.
    #[error(transparent)]
    Reclaimed(#[from] EpochReclaimed),
    /// Marks were added to the epoch after it was checked.
    #[error(transparent)]
    Extended(#[from] EpochExtended),
}

/// An error for an epoch that can't be reclaimed because its save is committing. Nothing was
/// reclaimed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the save of the open epoch is committing: wait until the commit has returned, which ends the \
     epoch"
)]
#[non_exhaustive]
pub struct EpochCommitting;

/// An error for an epoch whose marks were not discarded. They are in the bitmap again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ReleaseError<E> {
    /// The epoch was reclaimed before the commit. Nothing was committed.
    #[error("nothing was committed: {0}")]
    Reclaimed(#[from] EpochReclaimed),
    /// Marks were added to the epoch after it was checked. Nothing was committed.
    #[error("nothing was committed: {0}")]
    Extended(#[from] EpochExtended),
    /// The commit failed.
    #[error("the commit failed, and the marks of its epoch are back in the bitmap: {0}")]
    Commit(#[source] E),
}
