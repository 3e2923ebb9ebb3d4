//! The errors of creating guest RAM.

use std::io;

use dirty_bitmap::GeometryError;
use thiserror::Error;

/// An error of a bitmap that does not cover the guest's RAM.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the bitmap covers {bitmap_size:#x} bytes from {bitmap_start:#x} on, but the guest has \
     {ram_size:#x} bytes of RAM: create it with \
     `DirtyBitmap::new(0, layout.ram_size(), page_size)`"
)]
#[non_exhaustive]
pub struct BitmapMismatch {
    /// The start of the bitmap.
    pub bitmap_start: u64,
    /// The number of bytes that the bitmap covers.
    pub bitmap_size: u64,
    /// The size of the guest's RAM in bytes.
    pub ram_size: u64,
}

/// An error of creating guest RAM. Nothing stays mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// The start or the size of a region is not a multiple of the host's page size.
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes does not start and end at a \
         multiple of the host's page size of {page_size} bytes: KVM maps whole pages only"
    )]
    MisalignedRegion {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// The size of the region in bytes.
        size: u64,
        /// The host's page size in bytes.
        page_size: u64,
    },
    /// The given bitmap does not cover the RAM.
    #[error(transparent)]
    BitmapMismatch(#[from] BitmapMismatch),
    /// No bitmap can be created for the RAM.
    #[error("failed to create the dirty bitmap of the RAM")]
    Bitmap(#[source] GeometryError),
    /// The host did not provide the memory.
    #[error(
        "{call} of {size:#x} bytes of guest RAM failed: check the address-space limit \
         (ulimit -v), the overcommit policy, and, for a memory file, the file-size limit \
         (ulimit -f)"
    )]
    Allocate {
        /// The system call.
        call: &'static str,
        /// The size of the RAM in bytes.
        size: u64,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The number of host addresses is not the number of regions.
    #[error(
        "{given} host addresses for {regions} RAM regions: give one for each region, in the \
         layout's order"
    )]
    AddressCount {
        /// The number of host addresses.
        given: usize,
        /// The number of regions of the layout.
        regions: usize,
    },
    /// A host address is not the start of a page.
    #[error(
        "the host address {address:#x} is not a multiple of the page size of {page_size} bytes: \
         KVM maps whole pages only"
    )]
    MisalignedAddress {
        /// The host address.
        address: usize,
        /// The host's page size in bytes.
        page_size: u64,
    },
}
