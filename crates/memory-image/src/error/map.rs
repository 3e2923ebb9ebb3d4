//! Errors of mapping images.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{NotFullError, OpenImageError, ReadImageError};

/// An error returned if an image or chain could not be mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// The image could not be opened.
    #[error(transparent)]
    Open(#[from] OpenImageError),
    /// The image is a diff, or the chain has no full base.
    #[error(transparent)]
    NotFull(#[from] NotFullError),
    /// The image is packed: its pages are not at their guest offsets, so it cannot be mapped as it
    /// is.
    #[error("{path:?} is packed: convert it, or map it as a chain")]
    Packed {
        /// The path of the image.
        path: PathBuf,
    },
    /// There is no address space for the guest's RAM.
    #[error("failed to reserve {size} bytes of address space for the guest's RAM: {source}")]
    Reserve {
        /// The size of the RAM in bytes.
        size: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The process has no mapping left: [`max_mappings`](crate::MappedChainOptions::max_mappings)
    /// exceeds its limit.
    #[error(
        "failed to map the memory image {path:?}, because the process has no mapping left: \
         lower max_mappings, merge the chain, or raise vm.max_map_count: {source}"
    )]
    TooManyMappings {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The image cannot be mapped.
    #[error("failed to map the memory image {path:?}: {source}")]
    Map {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled")]
    Cancelled,
    /// An image could not be read.
    #[error(transparent)]
    Read(#[from] ReadImageError),
}
