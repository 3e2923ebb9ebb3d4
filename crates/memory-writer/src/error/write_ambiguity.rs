//! The reason why a raw diff is refused.

use sparse_file::PagesUnknown;
use thiserror::Error;

/// The reason why the pages of a raw diff that is being written cannot be distinguished from its
/// holes.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteAmbiguity {
    /// Holes do not identify written pages on the destination's file system.
    #[error(transparent)]
    Holes(#[from] PagesUnknown),
    /// The open file has no name: it is a memfd, a file of `O_TMPFILE` or a removed file. A reader
    /// derives the pages from holes only in a file with a name, whose directory it probes.
    #[error("the open file has no name, and the holes of such a file are not used")]
    NoName,
    /// A diff of every page has no hole, like a copy whose holes were filled with zeros.
    #[error("every page is dirty, so the file has no hole")]
    EveryPage,
    /// The file system reports other pages than those that were written.
    #[error("the file system reports the wrong state of the page at {offset:#x}")]
    NotAsWritten {
        /// The offset of the page in bytes.
        offset: u64,
    },
}
