//! Errors of the tracker by userfaultfd.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{CheckpointError, GeometryError, NotReleased, TrackerError};
use thiserror::Error;
use uffd::{AdoptError, OpenError, RegisterError, Stop};

/// An error for a tracker that could not start. The memory is unchanged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UffdTrackerError {
    /// A userfaultfd could not be opened.
    #[error("failed to track writes by userfaultfd: {0}")]
    Open(#[from] OpenError),
    /// The descriptor that the caller [passed](crate::UffdTrackerOptions::userfaultfd) cannot be
    /// used.
    #[error("the descriptor that was passed cannot track writes: {0}")]
    Passed(#[from] AdoptError),
    /// The memory could not be registered.
    #[error("failed to track writes by userfaultfd: {0}")]
    Register(#[from] RegisterError),
    /// The RAM has no host memory at an offset.
    #[error(
        "the RAM exposes no host memory at offset {offset:#x}: pass RAM that is mapped in this \
         process"
    )]
    NotExposed {
        /// The offset in the memory file.
        offset: u64,
    },
    /// The size of the RAM is not known.
    #[error("the reader does not know the size of the RAM: pass RAM that has a layout or a size")]
    UnknownSize,
    /// The bitmap could not be created.
    #[error("failed to create the bitmap of the tracked RAM: {0}")]
    Bitmap(#[from] GeometryError),
    /// The RAM cannot be tracked in pages of this size.
    #[error("failed to track writes by userfaultfd: {0}")]
    Tracker(#[from] TrackerError),
    /// Pages of this size cannot be protected.
    #[error(
        "pages of {page_size} bytes cannot be write-protected: for memory in huge pages, set \
         `page_size` to their size: {source}"
    )]
    PageSize {
        /// The page size of the tracker in bytes.
        page_size: u64,
        /// The error of the protection.
        #[source]
        source: UffdProtectError,
    },
    /// The thread that handles write faults could not start.
    #[error("failed to start the thread that handles write faults: {0}")]
    Thread(#[source] io::Error),
    /// The page table of this process could not be opened.
    #[error(
        "failed to open /proc/self/pagemap, which shows discarded pages: mount /proc, and make a \
         process dumpable that has changed its user: {0}"
    )]
    Pagemap(#[source] io::Error),
}

/// An error for protecting or unprotecting memory. Any part of the addresses may be protected.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "failed to change the write protection of the addresses {:#x}..{:#x}: {source}",
    addresses.start, addresses.end
)]
#[non_exhaustive]
pub struct UffdProtectError {
    /// The host addresses.
    pub addresses: Range<u64>,
    /// The reason.
    pub source: Stop,
}

/// An error of a checkpoint. All marks are in the bitmap.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UffdCheckpointError {
    /// The marks could not be taken, or their pages could not be protected.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError<UffdProtectError>),
    /// The handler of write faults has failed. All of the RAM is writable and not tracked.
    #[error(
        "the handler of write faults has failed, so the guest's writes are not tracked any more: \
         start a new tracker, whose next snapshot has all pages: {0}"
    )]
    Untracked(#[source] Arc<io::Error>),
    /// The epoch of the baseline was not released: another thread has reclaimed it.
    #[error(transparent)]
    NotReleased(#[from] NotReleased),
}
