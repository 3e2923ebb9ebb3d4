//! The errors of the dirty log.

use std::error::Error as StdError;
use std::io;

use dirty_bitmap::{BeginEpochError, ExtendError};
use thiserror::Error;

use crate::linux::slots::SlotError;

/// An error of switching the dirty log on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The RAM has a log already.
    #[error("the dirty log of this RAM was started already: use that DirtyLog, or drop it first")]
    AlreadyStarted,
    /// The RAM is guest memory of `vm-memory` with `AtomicBitmap`s, whose marks would be missing
    /// from the epochs of the log. Nothing was switched on.
    #[error(
        "writes of the host are marked in the AtomicBitmaps of the guest memory, not in the bitmap \
         of the RAM: start the log by \
         `DirtyLog::options().mark_host_writes(move |bitmap| bitmap.mark_guest_memory(&memory))`"
    )]
    MarksElsewhere,
    /// KVM does not offer `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    #[error(
        "this KVM can't protect logged pages on demand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, \
         Linux 5.2): leave out `DirtyLogOptions::reprotect`, which selects a supported way"
    )]
    NoManualProtect,
    /// KVM offers the capability, but refuses to enable it.
    #[error("KVM offers KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, but refuses to set it: {0}")]
    EnableManualProtect(#[source] io::Error),
    /// The log of a slot can't be switched on.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// An error of a harvest. No page is lost: see [`DirtyLog::harvest`](crate::DirtyLog::harvest).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HarvestError {
    /// The paused vCPUs belong to another virtual machine. Nothing was harvested.
    #[error(
        "the paused vCPUs belong to another virtual machine than the logged slots: \
         pause the vCPUs of this one"
    )]
    OtherMachine,
    /// `KVM_GET_DIRTY_LOG` failed.
    #[error(
        "KVM_GET_DIRTY_LOG of memory slot {slot} failed: the slot was removed or its log switched \
         off, not by this crate; restore the slot with its log on, then harvest again: {source}"
    )]
    Get {
        /// The slot number.
        slot: u32,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// `KVM_CLEAR_DIRTY_LOG` failed.
    #[error(
        "KVM_CLEAR_DIRTY_LOG of memory slot {slot} failed: its pages are marked, and the next \
         harvest marks them again: {source}"
    )]
    Clear {
        /// The slot number.
        slot: u32,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// The bitmap refused a part of the log. The rest of that slot's log is marked.
    #[error("the log of memory slot {slot} does not fit the bitmap: {source}")]
    Mark {
        /// The slot number.
        slot: u32,
        /// The error of the bitmap.
        #[source]
        source: dirty_bitmap::DirtyLogError,
    },
    /// The function of [`DirtyLogOptions::mark_host_writes`](crate::DirtyLogOptions) failed. The
    /// pages of KVM's log are marked.
    #[error("failed to mark the writes of the host: {0}")]
    HostWrites(#[source] Box<dyn StdError + Send + Sync>),
}

/// An error of beginning or extending an [epoch](dirty_bitmap::LoggedEpoch) of logged RAM. No page
/// is lost: all marks are in the bitmap or in the epoch.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LogEpochError {
    /// KVM's log could not be harvested.
    #[error(transparent)]
    Harvest(#[from] HarvestError),
    /// The marks of the bitmap could not be taken: another save is in progress.
    #[error(transparent)]
    Begin(#[from] BeginEpochError),
    /// The marks that were set since the last take could not be taken.
    #[error(transparent)]
    Extend(#[from] ExtendError),
    /// The epoch is of other RAM, whose log was not harvested.
    #[error(
        "the epoch is of other RAM than the log: extend it by a harvest of the DirtyLog of its RAM"
    )]
    OtherRam,
}
