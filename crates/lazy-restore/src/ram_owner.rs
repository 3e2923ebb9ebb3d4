//! Lazily filled memory as the RAM of a VMM.

#![allow(unsafe_code)]

use guest_ram::RamOwner;
use guest_ram::dirty_bitmap::ParentImage;

use crate::lazy_ram::LazyRam;

// SAFETY: `host_memory` lends memory that is mapped readable and writable until the value is
// dropped: its own region, or regions for which `LazyRamOptions::adopt` requires that. A missing
// page is filled when it is touched. No reference to the memory exists.
unsafe impl RamOwner for LazyRam {
    fn image(&self) -> ParentImage {
        self.pages.source().image()
    }
}
