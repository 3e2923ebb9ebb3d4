//! Why an image could not be read, merged, mapped or restored.

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
    /// The image can't be opened or looked at.
    #[error("cannot open the memory image {path:?}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, device, FIFO or socket.
    #[error("{path:?} is not a regular file: give the path of a memory image")]
    NotAFile {
        /// The path given.
        path: PathBuf,
    },
    /// The file has no bytes.
    #[error("{path:?} is empty: no guest has RAM of 0 bytes")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// The file is of a length that no raw image has: pages are of 512 bytes or more.
    #[error(
        "{path:?} can't be raw: {size} bytes are no multiple of 512. It is a sealed or packed image, or was cut off"
    )]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The page size is 0 or not a power of two.
    #[error("a page of {page_size} bytes: the page size must be a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size given, in bytes.
        page_size: u64,
    },
    /// The file is no whole number of pages: cut short, or of another page size.
    #[error(
        "{path:?} has {size} bytes, no whole number of {page_size}-byte pages: is it cut short?"
    )]
    NotWholePages {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The page size of the chain, in bytes.
        page_size: u64,
    },
    /// A diff of a guest with another RAM size.
    #[error(
        "the diff {path:?} is of a guest with {size} bytes of RAM, its base {base:?} of one with {base_size}: name images of one guest, and none that was cut short"
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
    /// The image is not sealed or packed, or can't be used as one. A raw image has to be opened as such: [`Image::open_raw`](crate::Image::open_raw).
    #[error("the memory image {path:?} can't be used as a sealed or packed one")]
    Footer {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: FooterError,
    },
    /// A diff where all of the RAM is needed.
    #[error("{path:?} is a diff: begin with the full image that it was taken after")]
    NotFull {
        /// The diff.
        path: PathBuf,
    },
    /// A page of a chain of diffs that none of them holds. It was clean, and its bytes are in an older image.
    #[error(
        "the page at {offset:#x} is in none of the diffs from {oldest:?} on: begin with the full image that they were taken after"
    )]
    NotInDiffs {
        /// Where the page starts in the guest's RAM, in bytes.
        offset: u64,
        /// The oldest diff of the chain.
        oldest: PathBuf,
    },
    /// An image whose pages are not at their offsets can't be mapped as it is.
    #[error("{path:?} is packed: convert it, or map it as a chain")]
    Packed {
        /// The image.
        path: PathBuf,
    },
    /// No image was named.
    #[error("there are no images: name at least one")]
    NoImages,
    /// A sealed image in smaller pages than the chain's.
    #[error(
        "{path:?} has pages of {image} bytes, the chain of {chain}: open the chain with the smallest"
    )]
    PageSizeDiffers {
        /// The image.
        path: PathBuf,
        /// Its page size in bytes.
        image: u64,
        /// The chain's, in bytes.
        chain: u64,
    },
    /// A diff of a guest with other address ranges.
    #[error(
        "{path:?} is of a guest whose RAM is at other addresses than that of {base:?}: name images of one guest"
    )]
    RegionsDiffer {
        /// The diff.
        path: PathBuf,
        /// The base image of the chain.
        base: PathBuf,
    },
    /// A diff that was not taken after the newest image.
    #[error("the diff {path:?} does not follow {newest:?}")]
    Link {
        /// The diff.
        path: PathBuf,
        /// The image that it should follow.
        newest: PathBuf,
        /// Why it doesn't.
        #[source]
        why: Link,
    },
    /// Which pages the diff holds can't be told from the file.
    #[error(
        "cannot tell which pages the diff {path:?} holds: give them to Chain::push_pages, or take it again, sealed"
    )]
    UnclearDiff {
        /// The diff.
        path: PathBuf,
        /// Why it can't be told.
        #[source]
        why: Unclear,
    },
    /// A run of pages that the diff can't hold.
    #[error("{start:#x}..{end:#x} is no range of an image of {size:#x} bytes")]
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
        "cannot read the memory image {path:?} at offset {offset:#x}: was it changed since it was opened?"
    )]
    Read {
        /// The image.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file was closed to keep the number of descriptors bounded (see [`Chain`](crate::Chain#many-images)), and is not as it was any more.
    #[error(
        "the memory image {path:?} was replaced, written to or removed while it was in use: leave the images of a long chain in place, merge it, or raise RLIMIT_NOFILE so that all of them stay open"
    )]
    Replaced {
        /// The image.
        path: PathBuf,
    },
    /// The file was resized or written to since it was opened.
    #[error(
        "the memory image {path:?} was written to while it was in use: what was made of it is not to be trusted; \
         leave images alone while they are read"
    )]
    Changed {
        /// The image.
        path: PathBuf,
    },
    /// A chain of diffs can't be written in larger pages than its own: they would also hold clean memory, whose bytes no diff has.
    #[error(
        "a chain of diffs in pages of {chain} bytes cannot be written in pages of {writer} bytes: open the writer with pages of at most {chain} bytes"
    )]
    LargerPages {
        /// The page size of the writer in bytes.
        writer: u64,
        /// The page size of the chain in bytes.
        chain: u64,
    },
    /// The images could not be written as one.
    #[error("writing the images as one failed")]
    Merge(#[from] SnapshotError),
    /// The progress function said [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled")]
    Cancelled,
    /// The memory to restore to is smaller or larger than the image.
    #[error(
        "the image has {image} bytes, the memory to restore it to {target}: they must be equal"
    )]
    TargetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the target in bytes.
        target: u64,
    },
    /// The target did not take the bytes.
    #[error("the restored bytes cannot be put at offset {offset:#x}")]
    Target {
        /// Where, in bytes from the start of the memory file.
        offset: u64,
        /// What the target said.
        source: io::Error,
    },
    /// There is no address space for the guest's RAM.
    #[error("cannot reserve {size} bytes of address space for the guest's RAM")]
    Reserve {
        /// The size of the RAM in bytes.
        size: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The RAM can't be filled as it is touched, or no longer.
    #[cfg(target_os = "linux")]
    #[error("the guest's RAM cannot be filled as it is touched")]
    Userfaultfd(#[from] crate::UserfaultfdError),
    /// A working set of another guest.
    #[cfg(target_os = "linux")]
    #[error(
        "the working set is of a guest with {working_set} bytes of RAM, the image of one with {image}: record it anew, of this guest"
    )]
    WorkingSetSize {
        /// The size of the chain's images in bytes.
        image: u64,
        /// The size of the RAM that the working set was recorded of, in bytes.
        working_set: u64,
    },
    /// The process can't have one more mapping: [`max_mappings`](crate::MappedChainOptions::max_mappings) is more than it has left.
    #[error(
        "no mapping is left for the memory image {path:?}: lower max_mappings, merge the chain, or raise vm.max_map_count"
    )]
    TooManyMappings {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image can't be mapped.
    #[error("cannot map the memory image {path:?}")]
    Map {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a diff does not follow the newest image of a chain.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Link {
    /// It is in the chain already.
    #[error("it is in the chain already: name each image once")]
    Repeated,
    /// It is a full image.
    #[error("it is a full image: begin a chain with it")]
    Full,
    /// It was taken after an older one.
    #[error(
        "it was taken after {parent:?}: put the images in the order in which they were taken, and none of another branch"
    )]
    Reordered {
        /// The image that it was taken after.
        parent: PathBuf,
    },
    /// Its parent is not here.
    #[error(
        "it was taken after the image {parent}, which is not in the chain, and not after {newest}: is one missing, or was it taken anew?"
    )]
    Missing {
        /// The parent that it names.
        parent: ImageId,
        /// The id of the newest image of the chain.
        newest: ImageId,
    },
    /// It names a parent, and the newest image is raw and has no id.
    #[error(
        "it was taken after the image {parent}, and a raw image has no id to tell whether it is that one: seal it"
    )]
    OnRaw {
        /// The parent that it names.
        parent: ImageId,
    },
    /// It names no parent, and the newest image has an id.
    #[error("it names no parent: give the id of the image before to Seal::parent when taking it")]
    NoParent,
}

/// Why the pages of a raw diff can't be told from the gaps between them.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unclear {
    /// Holes on its file system do not tell which pages were written.
    #[error(transparent)]
    Holes(#[from] PagesUnknown),
    /// The file changed while its holes were listed, or its file system contradicted itself.
    #[error("its holes changed while they were listed: leave the file alone meanwhile")]
    Changed,
    /// The file has no holes at all: all pages were dirty, or a copy filled the holes with zeros.
    #[error("it has no holes: either every page was dirty, or a copy filled the holes with zeros")]
    NoHoles,
    /// A hole begins or ends inside a page, so something dug it after the diff was written.
    #[error("a hole begins or ends inside the page at {offset:#x}: the file was rewritten since")]
    TornPage {
        /// Where the hole begins or ends, in bytes.
        offset: u64,
    },
}
