//! Errors of open files that a snapshot is to be written to.

use std::io;

use thiserror::Error;

/// The reason why a snapshot cannot be written to an open file. Nothing was written, except before
/// [`Truncated`](Self::Truncated).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenFileError {
    /// The descriptor is not of a regular file.
    #[error(
        "it is not a regular file: write to a pipe, socket or terminal with PackedStream, and to a \
         path with MemoryWriter::open"
    )]
    NotAFile,
    /// The file is open for reading only, or for writing only. Checksums of chunks that are written
    /// more than once are computed from the file.
    #[error("it is not open for reading and writing: open it with O_RDWR")]
    NotReadWrite,
    /// The file is open for appending. On Linux, each write would go to its end.
    #[error("it is open for appending: open it without O_APPEND")]
    Append,
    /// The file is open for direct I/O, which cannot write footers, whose lengths are not whole
    /// blocks.
    #[error("it is open for direct I/O: open it without O_DIRECT")]
    Direct,
    /// The file is not empty.
    #[error(
        "it is not empty (length: {len}): pass an empty file, or truncate it if its content is not needed"
    )]
    NotEmpty {
        /// The length of the file in bytes.
        len: u64,
    },
    /// Another program truncated the file while the snapshot was written.
    #[error(
        "its length is {len}, of {written} bytes that were written: write the snapshot again, to a \
         file that nothing else truncates"
    )]
    Truncated {
        /// The length of the file in bytes.
        len: u64,
        /// The length of what was written in bytes.
        written: u64,
    },
    /// The file cannot be examined.
    #[error("it cannot be examined: {0}")]
    Io(#[from] io::Error),
}
