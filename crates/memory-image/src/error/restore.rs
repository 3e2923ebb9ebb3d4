//! Errors of restoring a chain to memory.

use std::io;

use page_reader::RamLayout;
use thiserror::Error;

use super::{NotFullError, ReadImageError};

/// An error returned if a chain could not be restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The chain has no full base.
    #[error(transparent)]
    NotFull(#[from] NotFullError),
    /// The memory to restore to is smaller or larger than the image.
    #[error(
        "the image has {image} bytes, and the memory to restore it to has {target}: \
         give memory of the same size"
    )]
    TargetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the target in bytes.
        target: u64,
    },
    /// The memory is at other guest-physical addresses than the RAM of the images.
    #[error(
        "the images have RAM at the guest-physical addresses {image}, and the memory to restore \
         them to is at {target}: give memory with the regions of the images"
    )]
    TargetAddresses {
        /// The layout of the chain's images.
        image: RamLayout,
        /// The layout of the target.
        target: RamLayout,
    },
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled after {restored} bytes")]
    Cancelled {
        /// The number of bytes restored so far.
        restored: u64,
    },
    /// A run to restore ends before it starts, or past the RAM.
    #[error(
        "the run {start:#x}..{end:#x} to restore is not in the RAM, which has {ram_size} bytes: \
         give runs that end in the RAM, not before they start"
    )]
    InvalidRun {
        /// The first byte of the run.
        start: u64,
        /// The end of the run.
        end: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// An image could not be read, or was written to while it was read.
    #[error(transparent)]
    Read(#[from] ReadImageError),
    /// The target failed to write the bytes.
    #[error("failed to write the restored bytes at offset {offset:#x}: {source}")]
    Target {
        /// The offset of the failed write in the memory file, in bytes.
        offset: u64,
        /// The error of the target.
        source: io::Error,
    },
}
