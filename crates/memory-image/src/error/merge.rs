//! Errors of writing a chain as one image.

use memory_writer::SnapshotError;
use thiserror::Error;

use super::{NotFullError, ReadImageError, VerifyError};

/// An error returned if a chain could not be written as one image.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The chain has no full base, and the result would be a full image.
    #[error(transparent)]
    NotFull(#[from] NotFullError),
    /// A chain of diffs cannot be written in pages larger than its own: a larger page would also
    /// hold clean memory, whose bytes no diff has.
    #[error(
        "a chain of diffs in pages of {chain} bytes cannot be written in pages of {writer} bytes: \
         open the writer with pages of at most {chain} bytes"
    )]
    LargerPages {
        /// The page size of the writer in bytes.
        writer: u64,
        /// The page size of the chain in bytes.
        chain: u64,
    },
    /// An image of the chain is damaged, or could not be verified. Nothing was written.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// An image cannot be opened again, or was changed while it was read.
    #[error(transparent)]
    Read(#[from] ReadImageError),
    /// The image could not be written. The error reports the state of the destination.
    #[error("failed to write the merged image: {0}")]
    Write(#[from] SnapshotError),
}
