//! The errors of the tracker.

use std::error::Error;

use guest_ram::{BitmapMismatch, MisalignedRegion};
use thiserror::Error;

/// An error for RAM that can't be tracked. No page was marked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage2TrackerError {
    /// A region does not begin and end at a page boundary of the bitmap. Smaller pages are possible
    /// if stage 2 supports them.
    #[error(transparent)]
    MisalignedRegion(#[from] MisalignedRegion),
    /// The bitmap does not cover the memory file from 0 on.
    #[error(transparent)]
    BitmapMismatch(#[from] BitmapMismatch),
    /// The write tracker could not be created.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::TrackerError),
}

/// An error for a write fault that could not be handled. The write must not resume.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage2FaultError<E: Error + 'static> {
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
pub enum Stage2CheckpointError<E: Error + 'static> {
    /// A vCPU is running, or its exit is not handled yet.
    #[error(
        "vCPUs are running ({running}): stop them first (`hv_vcpus_exit`, and wait for their \
         threads), or begin with `checkpoint_live`"
    )]
    VcpuRunning {
        /// The number of running vCPUs. A vCPU whose fault is being handled is counted once more.
        running: u32,
    },
    /// Another save is in progress, or the protection failed.
    #[error(transparent)]
    Tracker(#[from] dirty_bitmap::CheckpointError<E>),
}

impl<E: Error> Stage2CheckpointError<E> {
    pub(super) fn vcpu_running(running: u32) -> Self {
        Self::VcpuRunning { running }
    }
}
