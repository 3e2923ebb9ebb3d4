//! Errors of live snapshots.

use std::io;
use std::sync::Arc;

use memory_writer::SnapshotError;
use thiserror::Error;

use crate::capture::Failure;
use crate::tracker::CheckpointFailed;

/// An error of a live snapshot. Nothing was committed, all marks of its epoch are in the bitmap of
/// the tracker, and the guest runs without harm.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LiveError {
    /// The tracker could not protect pages, or another save of its bitmap is in progress.
    #[error("failed to track the guest's writes for a live snapshot: {0}")]
    Tracker(#[source] CheckpointFailed),
    /// The image could not be written.
    #[error(transparent)]
    Write(#[from] SnapshotError),
    /// Another live snapshot of this guest is in progress.
    #[error(
        "another live snapshot of this guest is in progress: wait until it is written, or drop it"
    )]
    InProgress,
    /// The tracker cannot copy pages before they are overwritten.
    #[error(
        "the tracker of this guest cannot copy pages before they are overwritten: use the method \
         pre-copy or stop-and-copy"
    )]
    NoCopyOnWrite,
    /// The writer is for RAM of another size.
    #[error(
        "the writer is for {writer} bytes of RAM, but the guest has {guest}: open it with the size \
         of the guest's RAM"
    )]
    Size {
        /// The size of the RAM that the writer was opened with, in bytes.
        writer: u64,
        /// The size of the guest's RAM in bytes.
        guest: u64,
    },
    /// The pages of the image are larger than those of the tracker.
    #[error(
        "the image has pages of {image} bytes, but the guest's writes are tracked in pages of \
         {tracked} bytes: open the writer with pages of {tracked} bytes or a divisor of it"
    )]
    PageSize {
        /// The page size of the image in bytes.
        image: u64,
        /// The page size of the tracker in bytes.
        tracked: u64,
    },
    /// The pool has room for less than two pages.
    #[error(
        "a pool of {pool} bytes is too small for pages of {page_size} bytes: give it at least \
         {} bytes", page_size * 2
    )]
    PoolTooSmall {
        /// The size of the pool in bytes.
        pool: u64,
        /// The size of a page in bytes.
        page_size: u64,
    },
    /// Memory for the states of the pages or the pool is not available.
    #[error("failed to start the live snapshot: {0}")]
    Start(#[source] io::Error),
    /// The snapshot was cancelled by its token.
    #[error("the live snapshot was cancelled")]
    Cancelled,
    /// The guest dirtied memory faster than the image was written, and its vCPUs must not wait.
    #[error(
        "the guest dirtied memory faster than the image was written, and the pool is full: give \
         the pool more memory, let the guest wait (WhenPoolFull::Wait), or use the method pre-copy"
    )]
    PoolFull,
    /// A page was discarded before it was copied: by a balloon, free page reporting,
    /// `MADV_DONTNEED`, `MADV_REMOVE`, or a hole in the file of the RAM.
    #[error(
        "memory at offset {offset:#x} of the RAM was discarded before it was copied: pause \
         balloons and free page reporting until the live snapshot is written, and take it again"
    )]
    Discarded {
        /// The offset in the RAM of the copy that found the page, in bytes.
        offset: u64,
    },
    /// Guest memory could not be read.
    #[error("failed to copy guest memory at offset {offset:#x} of the RAM: {source}")]
    Memory {
        /// The offset in the RAM, in bytes.
        offset: u64,
        /// The error of the memory.
        source: Arc<io::Error>,
    },
}

impl LiveError {
    /// Returns the error of a capture, or `None` for a failure that another error states.
    pub(crate) fn of_capture(failure: Failure) -> Option<Self> {
        match failure {
            Failure::Memory { offset, error } => Some(Self::Memory {
                offset,
                source: error,
            }),
            Failure::Discarded { offset } => Some(Self::Discarded { offset }),
            Failure::PoolFull => Some(Self::PoolFull),
            Failure::NotPending { .. } | Failure::Ended => None,
        }
    }
}
