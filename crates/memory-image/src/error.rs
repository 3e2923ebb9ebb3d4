//! Errors, one type for each operation.

mod chain;
mod map;
mod merge;
mod open;
mod read;
mod restore;
mod verify;

use std::path::PathBuf;

use thiserror::Error;

pub use chain::{ChainError, LinkError, ReadAmbiguity};
pub use map::MapError;
pub use merge::MergeError;
pub use open::OpenImageError;
pub use read::ReadImageError;
pub use restore::RestoreError;
pub use verify::VerifyError;

/// The image is a diff, and a full image is required.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{path:?} is a diff: begin with the full image that it was taken after")]
#[non_exhaustive]
pub struct NotFullError {
    /// The diff.
    pub path: PathBuf,
}

impl NotFullError {
    /// Creates the error for the diff at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }
}
