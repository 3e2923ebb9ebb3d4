//! Errors of reading, merging, mapping and restoring images.

use std::io;
use std::path::PathBuf;

use image_format::{FooterError, ImageId};
use memory_writer::SnapshotError;
use sparse_file::PagesUnknown;
use thiserror::Error;

/// Why an image could not be read, merged, mapped or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The image cannot be opened, or its metadata cannot be read.
    #[error("failed to open the memory image {path:?}")]
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
    /// The file is empty.
    #[error("{path:?} is empty: give the path of a memory image")]
    Empty {
        /// The path of the image.
        path: PathBuf,
    },
    /// The length of the file is not valid for a raw image: pages have 512 bytes or more.
    #[error(
        "{path:?} is not a raw image, because {size} bytes are not a multiple of 512: \
         open it as a sealed or packed image, or take it again if it was truncated"
    )]
    NotRaw {
        /// The path of the image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The page size is 0 or not a power of two.
    #[error("invalid page size of {page_size} bytes: use a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size given, in bytes.
        page_size: u64,
    },
    /// The file is not a whole number of pages: it is truncated, or has another page size.
    #[error(
        "{path:?} has {size} bytes, which is not a whole number of {page_size}-byte pages: \
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
    /// The image is not a valid sealed or packed image. Open a raw image with
    /// [`Image::open_raw`](crate::Image::open_raw).
    #[error("the memory image {path:?} is not a valid sealed or packed image")]
    Footer {
        /// The path of the image.
        path: PathBuf,
        /// What is wrong with it.
        source: FooterError,
    },
    /// The image is a diff, and a full image is required.
    #[error("{path:?} is a diff: begin with the full image that it was taken after")]
    NotFull {
        /// The diff.
        path: PathBuf,
    },
    /// No diff of a chain of diffs holds the page. It was clean, and its bytes are in an older
    /// image.
    #[error(
        "the page at {offset:#x} is in none of the diffs from {oldest:?} on: \
         begin with the full image that they were taken after"
    )]
    NotInDiffs {
        /// Where the page starts in the guest's RAM, in bytes.
        offset: u64,
        /// The oldest diff of the chain.
        oldest: PathBuf,
    },
    /// The image is packed: its pages are not at their guest offsets, so it cannot be mapped as it
    /// is.
    #[error("{path:?} is packed: convert it, or map it as a chain")]
    Packed {
        /// The path of the image.
        path: PathBuf,
    },
    /// The list of images is empty.
    #[error("the list of images is empty: give at least one")]
    NoImages,
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
        /// The chain's, in bytes.
        chain: u64,
    },
    /// The diff belongs to a guest with other address ranges.
    #[error(
        "{path:?} belongs to a guest whose RAM is at other addresses than that of {base:?}: \
         give images of one guest"
    )]
    RegionsDiffer {
        /// The diff.
        path: PathBuf,
        /// The base image of the chain.
        base: PathBuf,
    },
    /// The diff does not follow the newest image.
    #[error("the diff {path:?} does not follow {newest:?}")]
    Link {
        /// The diff.
        path: PathBuf,
        /// The image that it should follow.
        newest: PathBuf,
        /// Why it does not follow.
        #[source]
        why: Link,
    },
    /// The file does not show which pages the diff holds.
    #[error(
        "failed to determine which pages the diff {path:?} holds: \
         pass them to Chain::push_pages, or take the diff again, sealed"
    )]
    UnclearDiff {
        /// The diff.
        path: PathBuf,
        /// Why the holes do not show the pages.
        #[source]
        why: Unclear,
    },
    /// The run of pages is not inside the image.
    #[error("{start:#x}..{end:#x} is not a range inside an image of {size:#x} bytes")]
    BadRun {
        /// Where the run starts, in bytes.
        start: u64,
        /// Where it ends, in bytes.
        end: u64,
        /// The size of the image in bytes.
        size: u64,
    },
    /// An image of the chain could not be read.
    #[error(
        "failed to read the memory image {path:?} at offset {offset:#x}: \
         check that the file was not changed since it was opened"
    )]
    Read {
        /// The path of the image.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
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
    /// A chain of diffs cannot be written in pages larger than its own: a larger page would also
    /// hold clean memory, whose bytes no diff has.
    #[error(
        "a chain of diffs in pages of {chain} bytes cannot be written in pages of {writer} bytes: \
         open the writer with pages of at most {chain} bytes"
    )]
    LargerPages {
        /// The page size of the writer in bytes.
        writer: u64,
        /// The page size of the chain in bytes.
        chain: u64,
    },
    /// The images could not be written as one.
    #[error("failed to write the merged image")]
    Merge(#[from] SnapshotError),
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled")]
    Cancelled,
    /// The memory to restore to is smaller or larger than the image.
    #[error(
        "the image has {image} bytes, and the memory to restore it to has {target}: \
         give memory of the same size"
    )]
    TargetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the target in bytes.
        target: u64,
    },
    /// The target failed to write the bytes.
    #[error("failed to write the restored bytes at offset {offset:#x}")]
    Target {
        /// Where, in bytes from the start of the memory file.
        offset: u64,
        /// The error of the target.
        source: io::Error,
    },
    /// There is no address space for the guest's RAM.
    #[error("failed to reserve {size} bytes of address space for the guest's RAM")]
    Reserve {
        /// The size of the RAM in bytes.
        size: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The RAM cannot be filled on demand, or can no longer be filled.
    #[cfg(target_os = "linux")]
    #[error("failed to fill the guest's RAM on demand")]
    Userfaultfd(#[from] crate::UserfaultfdError),
    /// The working set belongs to another guest.
    #[cfg(target_os = "linux")]
    #[error(
        "the working set belongs to a guest with {working_set} bytes of RAM, and the image to one \
         with {image}: record the working set of this guest"
    )]
    WorkingSetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the RAM that the working set was recorded of, in bytes.
        working_set: u64,
    },
    /// The process has no mapping left: [`max_mappings`](crate::MappedChainOptions::max_mappings)
    /// exceeds its limit.
    #[error(
        "failed to map the memory image {path:?}, because the process has no mapping left: \
         lower max_mappings, merge the chain, or raise vm.max_map_count"
    )]
    TooManyMappings {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The image cannot be mapped.
    #[error("failed to map the memory image {path:?}")]
    Map {
        /// The path of the image.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
}

/// Why a diff does not follow the newest image of a chain.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Link {
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

/// Why the pages of a raw diff cannot be distinguished from the gaps between them.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unclear {
    /// Holes on its file system do not show which pages were written.
    #[error(transparent)]
    Holes(#[from] PagesUnknown),
    /// The file changed while its holes were listed, or its file system reported contradictions.
    #[error(
        "its holes changed while they were listed: do not write to the file while it is opened"
    )]
    Changed,
    /// The file has no holes: all pages were dirty, or a copy filled the holes with zeros.
    #[error("it has no holes: either every page was dirty, or a copy filled the holes with zeros")]
    NoHoles,
    /// A hole begins or ends inside a page, so the file was rewritten after the diff was taken.
    #[error(
        "a hole begins or ends inside the page at {offset:#x}, so the file was rewritten: \
         take the diff again"
    )]
    TornPage {
        /// Where the hole begins or ends, in bytes.
        offset: u64,
    },
}
