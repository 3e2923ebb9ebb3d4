//! Errors of tracking by write faults.

use std::error::Error;
use std::ops::Range;

use thiserror::Error;

use crate::blocks::BLOCK_SIZE;
use crate::epoch::{BeginEpochError, ExtendError};
use crate::geometry::{GeometryError, OutOfRange};

/// An error for RAM that can't be tracked by write faults. No page was marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackerError {
    /// A page is larger than a [block](BLOCK_SIZE).
    #[error(
        "the page size {page_size} is larger than a block: make the bitmap with pages of at most \
         {BLOCK_SIZE} bytes"
    )]
    PageLargerThanBlock {
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// The RAM does not begin and end at a page boundary.
    #[error(
        "RAM of {ram_size} bytes at {ram_start:#x} does not consist of whole pages of \
         {page_size} bytes: align it, because only whole pages can be protected"
    )]
    NotAligned {
        /// The first address of the RAM.
        ram_start: u64,
        /// Its size in bytes.
        ram_size: u64,
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// Another tracker uses the bitmap. Each would take marks whose pages only the other protects
    /// again.
    #[error("the bitmap already has a tracker: drop that tracker first, or use a second bitmap")]
    AlreadyTracked,
    /// Memory for the state of the blocks can't be allocated.
    #[error("failed to allocate the state of the tracker: {0}")]
    OutOfMemory(#[source] GeometryError),
}

/// An error for a write fault that could not be handled. The write must not resume.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError<E: Error + 'static> {
    /// The address is not tracked.
    #[error("write fault at an untracked address: forward it to device emulation: {0}")]
    OutOfRange(#[source] OutOfRange),
    /// The platform failed to unprotect the pages. Every page that may be unprotected is marked.
    #[error(
        "failed to unprotect {:#x}..{:#x}: do not resume the write; handle the fault again when the \
         cause is removed, or stop the guest: {source}",
        range.start,
        range.end
    )]
    Unprotect {
        /// The addresses to unprotect.
        range: Range<u64>,
        /// The error of the platform.
        source: E,
    },
}

/// An error for a checkpoint that failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckpointError<E: Error + 'static> {
    /// An epoch could not begin. No mark was taken.
    #[error("failed to begin a checkpoint: {0}")]
    Epoch(#[source] BeginEpochError),
    /// The epoch could not be extended. No mark was taken.
    #[error("failed to extend the checkpoint: {0}")]
    Extend(#[source] ExtendError),
    /// The epoch belongs to another bitmap. No mark was taken.
    #[error("the epoch belongs to the bitmap of another tracker: extend it with that tracker")]
    OtherBitmap,
    /// The platform failed to protect the pages, and then failed to protect all of the RAM. The
    /// pages are marked.
    #[error(
        "failed to write-protect {:#x}..{:#x}: its pages stay dirty, so save them with the next \
         checkpoint: {source}",
        range.start, range.end
    )]
    Protect {
        /// The addresses to protect.
        range: Range<u64>,
        /// The error of the platform.
        source: E,
    },
}
