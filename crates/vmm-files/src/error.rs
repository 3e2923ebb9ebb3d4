//! Errors of reading and writing the files.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use page_reader::LayoutError;
use sparse_file::{SpaceError, WriteError};
use thiserror::Error;

use crate::format::Format;

/// An error of opening the memory of a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file cannot be opened or read.
    #[error("cannot read {path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The structure of a file is invalid or not supported.
    #[error("{path:?} cannot be read as {}, at byte {offset:#x}: {problem}", .format.noun())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The format it was opened as.
        format: Format,
        /// The position of the part that is invalid.
        offset: u64,
        /// What is wrong, and what can be done.
        problem: Cow<'static, str>,
    },
    /// The file does not have the magic number of any format.
    #[error(
        "{path:?} has no known format: if it is raw memory, open it as such, and name its machine or \
         its regions"
    )]
    Unrecognized {
        /// The file.
        path: PathBuf,
    },
    /// The addresses of the RAM are not valid.
    #[error("the RAM in {path:?} has no valid addresses: {source}")]
    Layout {
        /// The file.
        path: PathBuf,
        /// The error of the layout.
        source: LayoutError,
    },
}

/// An error of writing the memory of a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileWriteError {
    /// The file cannot get its size.
    #[error("the file cannot get the length {len}: {source}")]
    Grow {
        /// The size.
        len: u64,
        /// The error of the file system.
        source: SpaceError,
    },
    /// A header cannot be written.
    #[error("failed to write a header of length {len} at byte {offset:#x}: {source}")]
    Header {
        /// The position of the header in the file.
        offset: u64,
        /// Its length.
        len: usize,
        /// The error of the system.
        source: io::Error,
    },
    /// RAM cannot be read or written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The source of the RAM has changed.
    #[error("the source of the RAM is not usable: {source}")]
    Source {
        /// The error of the source.
        source: io::Error,
    },
    /// The write was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// An error of a file that the format cannot represent.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The file would be longer than any file can be.
    #[error("the file would have 2^63 bytes or more: dump less RAM")]
    TooLarge,
    /// The ranges of a file are not the RAM of the guest.
    #[error(
        "the RAM is at {ram}, the file has room for {file}: use the snapshot directory of the same guest"
    )]
    OtherRanges {
        /// The addresses of the RAM.
        ram: String,
        /// The addresses that the file has.
        file: String,
    },
}
