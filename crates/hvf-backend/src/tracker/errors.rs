//! What a tracker can't do, and what to do about it.

use std::error::Error;

use thiserror::Error;

/// This RAM can't be tracked. Nothing was marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// A region does not begin and end with a page.
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes does not begin and end with a page of {page_size} bytes, so its writes can't be \
         tracked: align it, or track in smaller pages where stage 2 has them"
    )]
    MisalignedRegion {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// The bitmap is of other RAM.
    #[error(
        "a bitmap of {bitmap_size:#x} bytes from {bitmap_start:#x} on does not cover the memory file, {ram_size:#x} bytes from 0 on: make it with \
         `TrackedBitmap::tracked(0, layout.ram_size(), page_size)`"
    )]
    BitmapMismatch {
        /// Where the bitmap starts.
        bitmap_start: u64,
        /// How much it covers, in bytes.
        bitmap_size: u64,
        /// How much RAM there is, in bytes.
        ram_size: u64,
    },
    /// The pages are too large, or there is no memory.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::TrackerError),
}

/// A write fault that could not be answered: the write must not go on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError<E: Error + 'static> {
    /// The address is no tracked RAM.
    #[error(
        "a write fault at guest-physical {guest_address:#x}, where no RAM is tracked: emulate the device that is there, or stop the vCPU"
    )]
    OutsideRam {
        /// The guest-physical address.
        guest_address: u64,
    },
    /// The protection could not be lifted. What may be open nevertheless is marked.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::FaultError<E>),
}

/// A checkpoint that could not be made. What is not protected is marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArmError<E: Error + 'static> {
    /// A vCPU is in the guest, or its exit is not handled yet.
    #[error(
        "{running} vCPUs are in the guest: stop them first (`hv_vcpus_exit`, and wait for their threads), or begin with `arm_running`"
    )]
    VcpuRunning {
        /// How many, each counted once for its turn and once while its fault is being answered.
        running: u32,
    },
    /// Another save is under way, or the protection failed.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::ArmError<E>),
}

impl<E: Error> ArmError<E> {
    pub(super) fn running(running: u32) -> Self {
        Self::VcpuRunning { running }
    }
}
