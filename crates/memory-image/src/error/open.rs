//! Errors of opening one image.

use std::io;
use std::path::PathBuf;

use image_format::FooterError;
use thiserror::Error;

/// An error returned if an image could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenImageError {
    /// The image cannot be opened, or its metadata cannot be read.
    #[error("failed to open the memory image {path:?}: {source}")]
    Open {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The path is a directory, device, FIFO or socket.
    #[error("{path:?} is not a regular file: give the path of a memory image")]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// The open file is a pipe, socket, terminal, device or directory.
    #[error(
        "{path:?} is not a regular file: copy the bytes of a pipe or socket to a file, or read \
         them to memory and pass them to Image::from_reader"
    )]
    NotSeekable {
        /// The name of the image.
        path: PathBuf,
    },
    /// The open file is not open for reading.
    #[error("{path:?} is not open for reading: open it with O_RDONLY or O_RDWR")]
    WriteOnly {
        /// The name of the image.
        path: PathBuf,
    },
    /// The image is in no directory.
    #[error("{path:?} is in no directory: it is a reader, or a file without a name")]
    NoDirectory {
        /// The name of the image.
        path: PathBuf,
    },
    /// The file is empty.
    #[error("{path:?} is empty: give the path of a memory image")]
    Empty {
        /// The path of the image.
        path: PathBuf,
    },
    /// The length of the file is not valid for a raw image: pages have 512 bytes or more.
    #[error(
        "{path:?} is not a raw image, because its length, {size}, is not a multiple of 512: \
         open it as a sealed or packed image, or take it again if it was truncated"
    )]
    NotRaw {
        /// The path of the image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The image is not a valid sealed or packed image. Open a raw image with
    /// [`Image::open_raw`](crate::Image::open_raw).
    #[error("the memory image {path:?} is not a valid sealed or packed image: {source}")]
    Footer {
        /// The path of the image.
        path: PathBuf,
        /// The error of the footer or header.
        source: FooterError,
    },
}
