//! Errors of reading the files of open images.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::damage::Damage;

/// An error returned if bytes of an open image or chain could not be read, or may be wrong.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadImageError {
    /// An image could not be read.
    #[error(
        "failed to read the memory image {path:?} at offset {offset:#x}: \
         check that the file was not changed since it was opened: {source}"
    )]
    Read {
        /// The path of the image.
        path: PathBuf,
        /// The offset of the failed read in the file, in bytes.
        offset: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file was closed to bound the number of descriptors (see
    /// [`Chain`](crate::Chain#many-images)), and cannot be opened again; or its metadata cannot be
    /// read.
    #[error("failed to open the memory image {path:?} again: {source}")]
    Reopen {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The file was closed to bound the number of descriptors (see
    /// [`Chain`](crate::Chain#many-images)), and has changed since.
    #[error(
        "the memory image {path:?} was replaced, written to or removed while it was in use: \
         leave the images of a long chain in place, merge the chain, or raise RLIMIT_NOFILE so \
         that all images stay open"
    )]
    Replaced {
        /// The path of the image.
        path: PathBuf,
    },
    /// The file was resized or written to since it was opened.
    #[error(
        "the memory image {path:?} was written to while it was in use, so the result may be wrong: \
         do not write to images while they are read"
    )]
    Changed {
        /// The path of the image.
        path: PathBuf,
    },
    /// The source of an image that is a reader [reports](page_reader::PageReader::check_source)
    /// that it may have changed.
    #[error("the memory image {path:?} may have changed while it was in use: {source}")]
    Source {
        /// The name of the image.
        path: PathBuf,
        /// The error of the reader.
        source: io::Error,
    },
    /// The image is a reader, which has no file to map and no version.
    #[error(
        "the memory image {path:?} is a reader without a file: restore it by Chain::restore, or \
         write its bytes to a file to map it"
    )]
    NoFile {
        /// The name of the image.
        path: PathBuf,
    },
    /// Bytes of the image do not match their checksum, and are not returned.
    #[error("{path:?} is damaged: restore it from a copy, or save the guest again: {damage}")]
    Damaged {
        /// The path of the image.
        path: PathBuf,
        /// The damaged chunk.
        damage: Damage,
    },
    /// No diff of a chain of diffs holds the page. It was clean, and its bytes are in an older
    /// image.
    #[error(
        "the page at {offset:#x} is in none of the diffs from {oldest:?} on: \
         begin with the full image that they were taken after"
    )]
    NotInDiffs {
        /// The offset of the page in the guest's RAM, in bytes.
        offset: u64,
        /// The oldest diff of the chain.
        oldest: PathBuf,
    },
}
