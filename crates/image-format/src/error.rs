//! Why a footer could not be read or written.

use std::io;

use thiserror::Error;

use crate::footer::Placement;

/// Why a footer could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FooterError {
    /// The file does not end in a footer and does not begin with the header of a packed image.
    #[error(
        "it is neither sealed nor packed, or its end was cut off: if it is raw RAM, name that format"
    )]
    NotSealed,
    /// The file begins as a packed image does, and is shorter than that image.
    #[error(
        "it is a packed image that was cut off after {actual} bytes{}: copy it again (if it is raw RAM that only begins like one, name that format)",
        claimed.map_or(String::new(), |claimed| format!(" of {claimed}"))
    )]
    Truncated {
        /// The length that the header states in bytes, if the header is intact.
        claimed: Option<u64>,
        /// The length of the file in bytes.
        actual: u64,
    },
    /// The file begins as a packed image does, and is longer than that image.
    #[error(
        "it is a packed image of {claimed} bytes, and has {actual}: cut off what was appended to it (if it is raw RAM that only begins like one, name that format)"
    )]
    Trailing {
        /// The length that the header states in bytes.
        claimed: u64,
        /// The length of the file in bytes.
        actual: u64,
    },
    /// The file ends as a sealed image does, and is of a length that only images of version 1 and raw RAM have. The guest may have
    /// written what stands at the end of its RAM.
    #[error(
        "it may be an image of version 1, or raw RAM that ends like one, as its {len} bytes are a multiple of 512: name its format"
    )]
    Ambiguous {
        /// The length of the file in bytes.
        len: u64,
    },
    /// The image is of another format than the caller named.
    #[error("it is {}: name that format, or none", found.name())]
    OtherPlacement {
        /// Where its footer says that its pages are.
        found: Placement,
    },
    /// The footer is of a later version of the format.
    #[error(
        "its footer is of version {version}, this library reads up to version 2: use a later one"
    )]
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
    #[error(
        "no RAM has {ram_size:#x} bytes in pages of {page_size:#x}: at most 2^52, in whole pages of 512 or more"
    )]
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
        checksums: u64,
        /// The chunks that have present bytes.
        chunks: u64,
    },
    /// Too much metadata.
    #[error("{len} bytes of metadata are more than 16 MiB: keep them in a file of their own")]
    Metadata {
        /// Its length in bytes.
        len: u64,
    },
    /// The header of a packed image is damaged, or is that of another image.
    #[error("the header at the start of the file is damaged, or of another image")]
    Header,
    /// The padding is not zeros, or the file's length is a multiple of 512.
    #[error("the footer is not padded as it should be")]
    Padding,
    /// Numbers of the footer's parts don't add up to its length.
    #[error("its parts are not as long as it is")]
    Length,
    /// The footer doesn't stand where the pages end.
    #[error("it stands at {offset:#x}, the pages end at {data_end:#x}")]
    Position {
        /// Where it stands in the file, in bytes.
        offset: u64,
        /// Where the pages end in the file, in bytes.
        data_end: u64,
    },
}
