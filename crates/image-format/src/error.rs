//! Why a footer could not be read or written.

use std::io;

use thiserror::Error;

/// Why a footer could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FooterError {
    /// The file doesn't end in a footer.
    #[error("it is not sealed: it has no footer at its end, or was cut short")]
    NotSealed,
    /// The footer is of a later version of the format.
    #[error("its footer is of version {version}, this library reads version 1: use a later one")]
    Version {
        /// The version it states.
        version: u32,
    },
    /// The footer is damaged.
    #[error("its footer is damaged at offset {offset:#x}")]
    Damaged {
        /// The offset in the file from which on it can't be right, in bytes.
        offset: u64,
        /// What doesn't fit, if the checksum didn't say it.
        source: Option<Invalid>,
    },
    /// What the footer says doesn't fit together, though its checksum is right; or, writing, what was given.
    #[error("its footer contradicts itself")]
    Invalid(#[from] Invalid),
    /// The footer is larger than this library takes.
    #[error(
        "a footer of {len} bytes is too large: save in larger pages, so that there are fewer runs"
    )]
    TooLarge {
        /// Its length in bytes.
        len: u64,
    },
    /// The file is open for appending. Nothing was written: on Linux each write would go to the end
    /// of the file, whatever its offset.
    #[error(
        "a footer can't be written to a file that is open for appending: open it without O_APPEND"
    )]
    Append,
    /// The system could not read or write it.
    #[error("its footer can't be {operation} at offset {offset:#x}")]
    Io {
        /// `read` or `written`.
        operation: &'static str,
        /// The offset in the file, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// What of a footer doesn't fit.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Invalid {
    /// Not a memory's size, or not a page's.
    #[error("no RAM has {ram_size:#x} bytes in pages of {page_size:#x}")]
    Sizes {
        /// The size of the RAM in bytes.
        ram_size: u64,
        /// The size of a page in bytes.
        page_size: u64,
    },
    /// A field has a value that means nothing.
    #[error("the {field} {value} means nothing")]
    Field {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u8,
    },
    /// A full image names a parent.
    #[error("a full image has no parent")]
    FullWithParent,
    /// A region is empty, or not after the one before.
    #[error("region {index} is empty or not after the one before")]
    Region {
        /// Its index.
        index: usize,
    },
    /// The regions are not as large as the RAM.
    #[error("the regions have {sum:#x} bytes, the RAM has {ram_size:#x}")]
    RegionsSum {
        /// The bytes of all regions.
        sum: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// A run is empty, not of whole pages, or not inside the RAM.
    #[error("run {index} is empty, not of whole pages, or not inside the RAM")]
    Run {
        /// Its index.
        index: usize,
    },
    /// A run overlaps the one before or lies before it; in a full image, doesn't follow it.
    #[error("run {index} doesn't follow the one before")]
    Order {
        /// Its index.
        index: usize,
    },
    /// A run is stored where it can't be.
    #[error("run {index} can't be stored at offset {offset:#x} of the file")]
    StoredAt {
        /// Its index.
        index: usize,
        /// The offset in the file, in bytes.
        offset: u64,
    },
    /// The runs of a packed image have a gap between them, or overlap.
    #[error(
        "packed runs leave a gap or overlap: at {offset:#x} of the file, where {expected:#x} was next"
    )]
    Packing {
        /// Where the next run should be, in bytes.
        expected: u64,
        /// Where it is, in bytes.
        offset: u64,
    },
    /// A full image says nothing of its last pages.
    #[error("a full image ends at {offset:#x} of its RAM")]
    NotFull {
        /// The guest offset after its last page, in bytes.
        offset: u64,
    },
    /// Not as many checksums as chunks with present bytes.
    #[error("there are {checksums} checksums for {chunks} chunks")]
    Checksums {
        /// The checksums.
        checksums: usize,
        /// The chunks that have present bytes.
        chunks: usize,
    },
    /// Too much metadata.
    #[error("{len} bytes of metadata are more than 16 MiB: keep them in a file of their own")]
    Metadata {
        /// Its length in bytes.
        len: u64,
    },
    /// Numbers of the footer's parts don't add up to its length.
    #[error("its parts are not as long as it is")]
    Length,
    /// The footer doesn't stand where the pages end.
    #[error("it stands at {offset:#x}, the pages end at {data_len:#x}")]
    Position {
        /// Where it stands in the file, in bytes.
        offset: u64,
        /// Where the pages end in the file, in bytes.
        data_len: u64,
    },
}
