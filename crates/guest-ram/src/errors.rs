//! The errors of creating guest RAM.

use std::io;

use dirty_bitmap::GeometryError;
#[cfg(feature = "vm-memory")]
use dirty_bitmap::SliceError;
#[cfg(feature = "vm-memory")]
use page_reader::LayoutError;
use page_reader::RamLayout;
use thiserror::Error;

/// An error for a bitmap that does not cover the guest's RAM.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the bitmap covers {bitmap_size} bytes from {bitmap_start:#x} on, but the guest has \
     {ram_size} bytes of RAM: create it with start 0 and the size of the RAM \
     (`layout.ram_size()`)"
)]
#[allow(clippy::exhaustive_structs)]
pub struct BitmapMismatch {
    /// The start of the bitmap.
    pub bitmap_start: u64,
    /// The number of bytes that the bitmap covers.
    pub bitmap_size: u64,
    /// The size of the guest's RAM in bytes.
    pub ram_size: u64,
}

/// An error for a RAM region that does not consist of whole pages.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the RAM region of {size} bytes at {guest_start:#x} does not start and end at a multiple of \
     the page size of {page_size} bytes: align it"
)]
#[allow(clippy::exhaustive_structs)]
pub struct MisalignedRegion {
    /// The guest-physical start of the region.
    pub guest_start: u64,
    /// The size of the region in bytes.
    pub size: u64,
    /// The page size in bytes: of the host, or of what protects the RAM.
    pub page_size: u64,
}

/// An error for guest RAM that could not be created. No memory stays mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// A region does not consist of whole pages of the host.
    #[error(transparent)]
    MisalignedRegion(#[from] MisalignedRegion),
    /// The given bitmap does not cover the RAM.
    #[error(transparent)]
    BitmapMismatch(#[from] BitmapMismatch),
    /// The bitmap of the RAM could not be created.
    #[error("failed to create the dirty bitmap of the RAM: {0}")]
    Bitmap(#[source] GeometryError),
    /// The host did not provide the memory.
    #[error(
        "{call} failed for {size} bytes of guest RAM: check the address-space limit \
         (ulimit -v), the overcommit policy, and, for a memory file, the file-size limit \
         (ulimit -f): {source}"
    )]
    Allocate {
        /// The system call.
        call: &'static str,
        /// The size of the memory in bytes.
        size: u64,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The number of host addresses is not the number of regions.
    #[error(
        "the number of host addresses ({given}) is not that of the RAM regions ({regions}): pass \
         one for each region, in the order of the layout"
    )]
    AddressCount {
        /// The number of host addresses passed.
        given: usize,
        /// The number of regions in the layout.
        regions: usize,
    },
    /// A host address is not at a page boundary.
    #[error(
        "the host address {address:#x} is not a multiple of the page size of {page_size} bytes: a \
         hypervisor maps whole pages only"
    )]
    MisalignedAddress {
        /// The host address.
        address: usize,
        /// The host's page size in bytes.
        page_size: u64,
    },
    /// The owner of the memory has more of it than the layout.
    #[error(
        "the owner has more memory than the {ram_size:#x} bytes of RAM in the layout: pass the \
         layout of all of its memory"
    )]
    LargerOwner {
        /// The size of the RAM in the layout in bytes.
        ram_size: u64,
    },
    /// The owner states other guest-physical addresses of its RAM than those of the layout.
    #[error(
        "the owner has RAM at the guest-physical addresses {owner}, and the layout at {layout}: \
         pass the layout of the owner"
    )]
    OtherAddresses {
        /// The layout of the owner.
        owner: RamLayout,
        /// The layout passed.
        layout: RamLayout,
    },
    /// The regions of the guest memory of `vm-memory` are not a layout.
    #[cfg(feature = "vm-memory")]
    #[error("the regions of the guest memory are not a RAM layout: {0}")]
    Layout(#[source] LayoutError),
    /// The regions of the guest memory of `vm-memory` do not mark their pages of one bitmap.
    #[cfg(feature = "vm-memory")]
    #[error("the guest memory does not mark its own pages of one bitmap: {0}")]
    Slices(#[from] SliceError),
    /// The owner marks another bitmap than that of the options. The RAM would lack its marks.
    #[error(
        "the owner of the memory marks another bitmap than the one in the options: pass the bitmap \
         of the owner, or none"
    )]
    OtherBitmap,
    /// The owner marks a bitmap of another kind than that of the RAM.
    #[error(
        "the owner of the memory marks a bitmap of another kind than that of the RAM: create it as \
         a `LoggedBitmap` for KVM, as a `TrackedBitmap` for a write tracker, or as a `DirtyBitmap` \
         for code that marks each write"
    )]
    BitmapKind,
    /// A mapping is not as large as its region.
    #[error(
        "a mapping of {mapped} bytes was made for the RAM region of {size} bytes at \
         {guest_start:#x}: map as many bytes as the region has"
    )]
    MappingSize {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// The size of the region in bytes.
        size: u64,
        /// The size of the mapping in bytes.
        mapped: usize,
    },
}
