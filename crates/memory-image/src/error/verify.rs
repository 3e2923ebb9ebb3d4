//! Errors of verifying an image.

use std::path::PathBuf;

use thiserror::Error;

use super::ReadImageError;
use crate::damage::VerifyReport;

/// An error returned if an image could not be verified.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The image is raw.
    #[error("{path:?} is a raw image, which has no checksums: verify a sealed or packed image")]
    NotSealed {
        /// The path of the image.
        path: PathBuf,
    },
    /// The file could not be read, or was written to since it was opened.
    #[error(transparent)]
    Read(#[from] ReadImageError),
    /// The image is damaged.
    #[error("{path:?} is damaged: restore it from a copy, or save the guest again: {report}")]
    Damaged {
        /// The path of the image.
        path: PathBuf,
        /// What was found.
        report: VerifyReport,
    },
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled")]
    Cancelled,
}
