//! The errors of the tracker.

use std::error::Error;

use thiserror::Error;

/// An error for RAM that can't be tracked. No page was marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// A region does not begin and end at a page boundary.
    #[error(
        "the RAM region of {size:#x} bytes at {guest_start:#x} does not consist of whole pages of \
         {page_size} bytes: align it, or track in smaller pages if stage 2 supports them"
    )]
    MisalignedRegion {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The bitmap's page size in bytes.
        page_size: u64,
    },
    /// The bitmap covers other addresses.
    #[error(
        "the bitmap of {bitmap_size:#x} bytes at {bitmap_start:#x} does not match the memory file \
         of {ram_size:#x} bytes at 0: create it with `TrackedBitmap::tracked(0, layout.ram_size(), \
         page_size)`"
    )]
    BitmapMismatch {
        /// The start of the bitmap.
        bitmap_start: u64,
        /// The size of the bitmap in bytes.
        bitmap_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// The write tracker could not be created.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::TrackerError),
}

/// An error for a write fault that could not be handled. The write must not resume.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError<E: Error + 'static> {
    /// The address is not in the tracked RAM.
    #[error(
        "write fault at guest-physical address {guest_address:#x}, which is not tracked RAM: \
         emulate the device at this address, or stop the vCPU"
    )]
    OutsideRam {
        /// The guest-physical address.
        guest_address: u64,
    },
    /// The page could not be unprotected. Every page that may be unprotected is marked.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::FaultError<E>),
}

/// An error for a checkpoint that failed. Every page that is not protected is marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArmError<E: Error + 'static> {
    /// A vCPU is running, or its exit is not handled yet.
    #[error(
        "{running} vCPUs are running: stop them first (`hv_vcpus_exit`, and wait for their \
         threads), or begin with `arm_running`"
    )]
    VcpuRunning {
        /// The number of running vCPUs. A vCPU whose fault is being handled is counted once more.
        running: u32,
    },
    /// Another save is in progress, or the protection failed.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::CheckpointError<E>),
}

impl<E: Error> ArmError<E> {
    pub(super) fn vcpu_running(running: u32) -> Self {
        Self::VcpuRunning { running }
    }
}
