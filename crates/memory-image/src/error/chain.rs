//! Errors of putting images together to a chain.

use std::ops::Range;
use std::path::PathBuf;

use image_format::{ImageId, RegionList};
use sparse_file::PagesUnknown;
use thiserror::Error;

use super::{NotFullError, OpenImageError, ReadImageError};

/// An error returned if an image could not be added to a chain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChainError {
    /// The image could not be opened.
    #[error(transparent)]
    Open(#[from] OpenImageError),
    /// The pages of a raw image could not be listed.
    #[error(transparent)]
    Read(#[from] ReadImageError),
    /// The base of the chain is a diff.
    #[error(transparent)]
    NotFull(#[from] NotFullError),
    /// The list of images is empty.
    #[error("the list of images is empty: give at least one")]
    NoImages,
    /// The page size is 0 or not a power of two.
    #[error("invalid page size of {page_size} bytes: use a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size given, in bytes.
        page_size: u64,
    },
    /// The file is not a whole number of pages: it is truncated, or has another page size.
    #[error(
        "{path:?} has length {size}, which is not a whole number of {page_size}-byte pages: \
         check that it was not truncated"
    )]
    NotWholePages {
        /// The path of the image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The page size of the chain, in bytes.
        page_size: u64,
    },
    /// The page size of a sealed image is smaller than the chain's.
    #[error(
        "{path:?} has pages of {image} bytes, and the chain has pages of {chain} bytes: \
         open the chain with the smallest page size"
    )]
    PageSizeDiffers {
        /// The path of the image.
        path: PathBuf,
        /// Its page size in bytes.
        image: u64,
        /// The page size of the chain in bytes.
        chain: u64,
    },
    /// The diff belongs to a guest with another RAM size.
    #[error(
        "the diff {path:?} belongs to a guest with {size} bytes of RAM, and its base {base:?} to \
         one with {base_size}: give complete images of one guest"
    )]
    SizeDiffers {
        /// The diff.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The base image of the chain.
        base: PathBuf,
        /// The base's size in bytes.
        base_size: u64,
    },
    /// The diff belongs to a guest with other address ranges.
    #[error(
        "{path:?} belongs to a guest whose RAM is at other addresses than that of {base:?}, at {} \
         instead of {}: give images of one guest",
        RegionList(regions),
        RegionList(base_regions)
    )]
    RegionsDiffer {
        /// The diff.
        path: PathBuf,
        /// The address ranges of the diff's guest.
        regions: Vec<Range<u64>>,
        /// The base image of the chain.
        base: PathBuf,
        /// The address ranges of the chain's guest.
        base_regions: Vec<Range<u64>>,
    },
    /// The diff does not follow the newest image.
    #[error("the diff {path:?} does not follow {newest:?}: {why}")]
    Link {
        /// The diff.
        path: PathBuf,
        /// The image that it should follow.
        newest: PathBuf,
        /// The reason why it does not follow.
        #[source]
        why: LinkError,
    },
    /// The file does not show which pages the diff holds.
    #[error(
        "failed to determine which pages the diff {path:?} holds: \
         pass them to Chain::push_pages or push_image_pages, or take the diff again, sealed: {why}"
    )]
    AmbiguousDiff {
        /// The diff.
        path: PathBuf,
        /// The reason why the holes do not identify the pages.
        #[source]
        why: ReadAmbiguity,
    },
    /// Pages were passed for a sealed or packed diff, which lists its own.
    #[error("{path:?} lists its pages: add it by Chain::push_image")]
    NotRawDiff {
        /// The diff.
        path: PathBuf,
    },
    /// The run of pages is not inside the image.
    #[error("{start:#x}..{end:#x} is not a range inside an image of {size} bytes")]
    BadRun {
        /// The start of the run in bytes.
        start: u64,
        /// The end of the run in bytes, exclusive.
        end: u64,
        /// The size of the image in bytes.
        size: u64,
    },
}

/// A reason why a diff does not follow the newest image of a chain.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkError {
    /// The image is already in the chain.
    #[error("it is already in the chain: give each image once")]
    Repeated,
    /// The image is a full image.
    #[error("it is a full image: begin a chain with it")]
    Full,
    /// The diff was taken after an older image of the chain.
    #[error(
        "it was taken after {parent:?}: give the images of one branch, in the order in which they \
         were taken"
    )]
    Reordered {
        /// The image that it was taken after.
        parent: PathBuf,
    },
    /// The parent of the diff is not in the chain.
    #[error(
        "it was taken after the image {parent}, which is not in the chain, and not after {newest}: \
         an image is missing or was retaken"
    )]
    Missing {
        /// The parent that it names.
        parent: ImageId,
        /// The id of the newest image of the chain.
        newest: ImageId,
    },
    /// The diff names a parent, and the newest image is raw and has no id.
    #[error(
        "it was taken after the image {parent}, and the newest image is raw and has no id to \
         compare: seal the images"
    )]
    OnRaw {
        /// The parent that it names.
        parent: ImageId,
    },
    /// The diff names no parent, and the newest image has an id.
    #[error(
        "it names no parent: pass the id of the image before it to Seal::parent when taking it"
    )]
    NoParent,
}

/// A reason why the pages of a raw diff that is being read cannot be distinguished from the gaps
/// between them.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadAmbiguity {
    /// Holes on its file system do not show which pages were written.
    #[error(transparent)]
    Holes(#[from] PagesUnknown),
    /// The image is a reader, which has no holes.
    #[error("it is a reader, which has no holes")]
    NoFile,
    /// The image is an open file without a name, so the directory of its file cannot be probed.
    #[error("it is an open file without a name, so its directory cannot be probed for holes")]
    NoDirectory,
    /// The file changed while its holes were listed, or its file system reported contradictions.
    #[error(
        "its holes changed while they were listed: do not write to the file while it is opened"
    )]
    Changed,
    /// The file has no holes: all pages were dirty, or a copy filled the holes with zeros.
    #[error("it has no holes: either every page was dirty, or a copy filled the holes with zeros")]
    NoHoles,
    /// A hole begins or ends inside a page: the diff was written in smaller pages, or the file was
    /// rewritten after the diff was taken.
    #[error(
        "a hole begins or ends inside the page at {offset:#x}: read the diff with the page size \
         that it was written with; if this was done, the file was rewritten, so take the diff again"
    )]
    TornPage {
        /// The offset at which the hole begins or ends, in bytes.
        offset: u64,
    },
}
