//! What several test files use.

use hvf_backend::GicPlace;

/// Where the interrupt controller of a test is: below all RAM.
pub(crate) const GIC: GicPlace = GicPlace {
    distributor: 0x800_0000,
    redistributors: 0x1000_0000,
};
