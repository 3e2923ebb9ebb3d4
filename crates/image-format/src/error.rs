//! Errors of reading and writing a footer.

use std::io;

use thiserror::Error;

use crate::layout::Layout;

/// An error of reading or writing a footer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FooterError {
    /// The file does not end in a footer, and does not start with the header of a packed image.
    #[error(
        "the file is neither sealed nor packed, or its end was cut off: if it is raw RAM, name \
         that format"
    )]
    NotSealed,
    /// The file starts like a packed image, and is shorter than that image.
    #[error(
        "the file is a packed image that was cut off at length {actual}{}: copy it again, or \
         name the raw format if it is raw RAM that starts like a packed image",
        claimed.map_or(String::new(), |claimed| format!(" of {claimed}"))
    )]
    Truncated {
        /// The length that the header states in bytes, if the header is intact.
        claimed: Option<u64>,
        /// The length of the file in bytes.
        actual: u64,
    },
    /// The file starts like a packed image, and is longer than that image.
    #[error(
        "the file is a packed image of {claimed} bytes, but has {actual} bytes: remove the \
         appended bytes, or name the raw format if it is raw RAM that starts like a packed image"
    )]
    Trailing {
        /// The length that the header states in bytes.
        claimed: u64,
        /// The length of the file in bytes.
        actual: u64,
    },
    /// The file ends like an image of version 1, and its length is one that raw RAM can have. The
    /// guest may have written the end of its RAM.
    #[error(
        "the file may be an image of version 1, or raw RAM that ends like one, because its length, \
         {len}, is a multiple of 512: name its format"
    )]
    Ambiguous {
        /// The length of the file in bytes.
        len: u64,
    },
    /// The format of the image differs from the one that the caller named.
    #[error("the file is {}: name that format, or none", found.name())]
    OtherLayout {
        /// The layout according to the footer.
        found: Layout,
    },
    /// The version of the footer is not supported.
    #[error(
        "the footer has version {version}, but only versions up to 2 are supported: use a newer \
         release"
    )]
    Version {
        /// The version of the footer.
        version: u32,
    },
    /// The footer is damaged.
    #[error(
        "the footer is damaged at offset {offset:#x}: use another copy of the image{}",
        reason(source.as_ref())
    )]
    Damaged {
        /// The file offset of the first invalid field, in bytes.
        offset: u64,
        /// The inconsistency, or `None` if a magic number or checksum is wrong.
        source: Option<InvalidFooter>,
    },
    /// The footer is inconsistent although its checksum is correct, or the footer to be written is.
    #[error("the footer is inconsistent: {0}")]
    Invalid(#[from] InvalidFooter),
    /// The footer exceeds the maximum length.
    #[error("a footer of length {len} is too large: use larger pages, which result in fewer runs")]
    TooLarge {
        /// The length of the footer in bytes.
        len: u64,
    },
    /// The file is open for appending. Nothing was written: on Linux, each write would go to the
    /// end of the file, regardless of its offset.
    #[error(
        "failed to write the footer to a file that is open for appending: open it without O_APPEND"
    )]
    Append,
    /// A system call failed.
    #[error("failed to {operation} the footer at offset {offset:#x}: {source}")]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// The file offset in bytes.
        offset: u64,
        /// The system error.
        source: io::Error,
    },
}

impl FooterError {
    /// Returns the error of a footer that is damaged at `offset`.
    pub(crate) fn damaged(offset: u64, invalid: InvalidFooter) -> Self {
        Self::Damaged {
            offset,
            source: Some(invalid),
        }
    }

    /// Returns the error of bytes at `offset` that cannot be read.
    pub(crate) fn unreadable(offset: u64, source: io::Error) -> Self {
        Self::Io {
            operation: "read",
            offset,
            source,
        }
    }
}

/// An inconsistency of a footer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InvalidFooter {
    /// The size of the RAM or of a page is not supported.
    #[error(
        "a RAM size of {ram_size} bytes with pages of {page_size} bytes is not supported: \
         use at most 2^52 bytes, and whole pages of a power of two from 512 bytes"
    )]
    Sizes {
        /// The size of the RAM in bytes.
        ram_size: u64,
        /// The size of a page in bytes.
        page_size: u64,
    },
    /// A field has an undefined value.
    #[error("the {field} has the undefined value {value}")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// The value of the field.
        value: u8,
    },
    /// The layout is raw.
    #[error("a raw image has no footer: choose the sealed or the packed layout")]
    Raw,
    /// A full image names a parent.
    #[error("a full image has no parent")]
    FullWithParent,
    /// An image is its own parent.
    #[error("the image is its own parent: give it another id")]
    OwnParent,
    /// A region is empty, or not after the previous one.
    #[error("region {index} is empty or not after the previous one")]
    Region {
        /// The index of the region.
        index: usize,
    },
    /// The sizes of the regions do not add up to the RAM size.
    #[error("the regions have {sum} bytes, but the RAM has {ram_size} bytes")]
    RegionsSum {
        /// The total size of the regions in bytes.
        sum: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// A run is empty, not of whole pages, or not inside the RAM.
    #[error("run {index} is empty, not of whole pages, or not inside the RAM")]
    Run {
        /// The index of the run.
        index: usize,
    },
    /// A run overlaps the previous one or is before it. In a full image, a run is not adjacent to
    /// the previous one.
    #[error("run {index} does not follow the previous one")]
    Order {
        /// The index of the run.
        index: usize,
    },
    /// A run is stored at an invalid offset.
    #[error("run {index} has the invalid file offset {offset:#x}")]
    StoredAt {
        /// The index of the run.
        index: usize,
        /// The file offset in bytes.
        offset: u64,
    },
    /// The runs of a packed image overlap or have a gap between them.
    #[error(
        "packed runs overlap or have a gap: the file offset is {offset:#x} instead of {expected:#x}"
    )]
    Packing {
        /// The expected file offset of the next run, in bytes.
        expected: u64,
        /// The actual file offset, in bytes.
        offset: u64,
    },
    /// The runs of a full image do not cover the end of the RAM.
    #[error("the runs of a full image end at {offset:#x}, before the end of the RAM")]
    NotFull {
        /// The guest offset after the last run, in bytes.
        offset: u64,
    },
    /// The number of checksums differs from that of chunks with present bytes.
    #[error("the number of checksums ({checksums}) is not that of the chunks ({chunks})")]
    Checksums {
        /// The number of checksums.
        checksums: u64,
        /// The number of chunks with present bytes.
        chunks: u64,
    },
    /// The metadata is too long.
    #[error("metadata of length {len} exceeds the limit of 16 MiB: store them in a separate file")]
    Metadata {
        /// The length of the metadata in bytes.
        len: u64,
    },
    /// The header of a packed image is damaged or belongs to another image.
    #[error("the header at the start of the file is damaged or belongs to another image")]
    Header,
    /// The padding is not zeros, or the length of the file is a multiple of 512.
    #[error("the padding of the footer is invalid")]
    Padding,
    /// The lengths of the footer's parts do not add up to its length.
    #[error("the lengths of its parts do not add up to the length of the footer")]
    Length,
    /// The footer does not start where the pages end.
    #[error("the footer starts at {offset:#x}, but the pages end at {data_end:#x}")]
    Position {
        /// The file offset of the footer, in bytes.
        offset: u64,
        /// The file offset of the end of the pages, in bytes.
        data_end: u64,
    },
}

/// Returns the reason as the end of an error's text.
fn reason(source: Option<&InvalidFooter>) -> String {
    source.map_or_else(String::new, |source| format!(": {source}"))
}
