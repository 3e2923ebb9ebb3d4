//! Errors of filling memory on demand.

use std::io;
use std::sync::Arc;

use memory_image::{NotFullError, ReadImageError};
use nix::errno::Errno;
use thiserror::Error;

use crate::userfaultfd::UserfaultfdError;

/// A reason why a wait did not end with all pages in memory.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled")]
    Cancelled,
    /// A page could not be filled.
    #[error(transparent)]
    Fill(Arc<LazyError>),
}

/// An error returned if a guest's RAM cannot be filled on demand, or can no longer be filled.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LazyError {
    /// The chain has no full base.
    #[error(transparent)]
    NotFull(#[from] NotFullError),
    /// The memory to fill is smaller or larger than the image.
    #[error(
        "the image has {image} bytes, and the memory to restore it to has {target}: \
         give memory of the same size"
    )]
    TargetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the memory in bytes.
        target: u64,
    },
    /// The source has no RAM.
    #[error("the source has 0 bytes of RAM: give the size of the guest's RAM")]
    NoRam,
    /// The working set belongs to another guest.
    #[error(
        "the working set belongs to a guest with {working_set} bytes of RAM, and the image to one \
         with {image}: record the working set of this guest"
    )]
    WorkingSetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size in bytes of the RAM that the working set describes.
        working_set: u64,
    },
    /// There is no address space for the guest's RAM.
    #[error("failed to reserve {size} bytes of address space for the guest's RAM: {source}")]
    Reserve {
        /// The size of the RAM in bytes.
        size: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A page could not be read from the images of a chain, or they were changed.
    #[error(transparent)]
    Read(#[from] ReadImageError),
    /// A page could not be read from another source than a chain.
    #[error(
        "failed to read the guest's RAM at offset {offset:#x} from its source: the page is \
         inaccessible, so restore the guest again once the source can be read: {source}"
    )]
    ReadSource {
        /// The offset in the RAM, in bytes, at which the read began.
        offset: u64,
        /// The error of the source.
        source: io::Error,
    },
    /// Another source than a chain is not complete, or was changed while RAM was filled from it.
    #[error(
        "the source of the guest's RAM is not complete, or was changed: keep it unchanged until \
         filling has completed: {0}"
    )]
    Source(#[source] io::Error),
    /// The kernel does not fill memory on demand here, or no longer does.
    #[error("failed to fill the guest's RAM on demand: {0}")]
    Userfaultfd(#[from] UserfaultfdError),
}

impl LazyError {
    /// Converts an error of a source's read at `offset`.
    pub(crate) fn of_read(offset: u64, error: io::Error) -> Self {
        let other = |source| Self::ReadSource { offset, source };
        error.downcast().map_or_else(other, Self::Read)
    }

    /// Converts an error of the checks of a source.
    pub(crate) fn of_source(error: io::Error) -> Self {
        let other = |error: io::Error| error.downcast().map_or_else(Self::Source, Self::Read);
        error.downcast().map_or_else(other, Self::NotFull)
    }
    /// Returns whether the source of the bytes has failed, for some of its bytes.
    pub(crate) fn is_of_source(&self) -> bool {
        match self {
            Self::Read(_) | Self::ReadSource { .. } => true,
            Self::NotFull(_)
            | Self::TargetSize { .. }
            | Self::NoRam
            | Self::WorkingSetSize { .. }
            | Self::Reserve { .. }
            | Self::Source(_)
            | Self::Userfaultfd(_) => false,
        }
    }

    /// Returns whether the process that owns the memory has exited.
    pub(crate) fn is_of_exit(&self) -> bool {
        let Self::Userfaultfd(UserfaultfdError::Fill { source, .. }) = self else {
            return false;
        };
        source.raw_os_error() == Some(Errno::ESRCH as i32)
    }
}
