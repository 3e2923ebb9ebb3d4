//! Errors of layouts and of ranges of RAM.

/// An error in the ranges of a RAM layout. Ranges are start and size, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No region was given.
    #[error("the guest has no RAM region: give at least one")]
    NoRegion,
    /// A region is empty.
    #[error("the RAM region at {guest_start:#x} is empty: leave it out, or give its size in bytes")]
    EmptyRegion {
        /// Its guest-physical start.
        guest_start: u64,
    },
    /// The start or end of a region is not a multiple of
    /// [`RamLayout::ALIGNMENT`](crate::RamLayout::ALIGNMENT).
    #[error(
        "the RAM region at {guest_start:#x} of {size} bytes does not start and end at a \
         multiple of 4096 bytes: give whole pages"
    )]
    Misaligned {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size.
        size: u64,
    },
    /// The end of a region is not a 64-bit address.
    #[error(
        "the RAM region at {guest_start:#x} of {size} bytes ends past the 64-bit guest-physical \
         address space"
    )]
    PastAddressSpace {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size.
        size: u64,
    },
    /// Two regions overlap.
    #[error(
        "the RAM region at {guest_start:#x} overlaps the region at {previous_start:#x}, which ends \
         at {previous_end:#x}: give regions that do not overlap"
    )]
    Overlap {
        /// The guest-physical start of the lower region.
        previous_start: u64,
        /// The first guest-physical address after it.
        previous_end: u64,
        /// The start of the other.
        guest_start: u64,
    },
    /// The sizes of the regions add up to 2<sup>63</sup> bytes or more: file offsets are signed
    /// 64-bit numbers.
    #[error("the RAM regions add up to 2^63 bytes or more, which exceeds the largest file")]
    TooLarge,
}

/// The error of a range that is not entirely RAM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutsideRam {
    /// A guest-physical range includes an address outside of all regions.
    #[error(
        "a range of length {size} at guest-physical address {guest_start:#x} is not all RAM: there \
         is no RAM at {outside:#x}"
    )]
    Guest {
        /// The start of the range.
        guest_start: u64,
        /// The size of the range in bytes.
        size: u64,
        /// The lowest address of the range that is not RAM.
        outside: u64,
    },
    /// A range of the memory file ends past the RAM.
    #[error(
        "a range of length {size} at offset {offset:#x} ends past the {ram_size} bytes of RAM in the \
         memory file"
    )]
    File {
        /// The start of the range.
        offset: u64,
        /// The size of the range in bytes.
        size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
}
