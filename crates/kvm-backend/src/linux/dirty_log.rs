//! KVM's dirty log, moved into a bitmap.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use dirty_bitmap::DirtyBitmap;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use page_reader::RamRange;
use thiserror::Error;

use super::ram::{BitmapMismatch, marking_base};
use super::slots::{RamSlots, SlotError};
use super::sys;

/// Pages cleared by one call: 1 GiB in pages of 4 KiB. KVM holds the guest's page-table lock meanwhile, and vCPUs that fault wait.
const CLEAR_PAGES: usize = 1 << 18;

/// KVM's log of the pages that a guest writes.
///
/// On from [`start`](Self::start) until [`stop`](Self::stop): a value that is merely dropped leaves the log on, and the next
/// `start` finds what it holds. What was written before the first `start` is in no log, so the chain of snapshots begins
/// with a full one, taken after `start`.
///
/// # Running vCPUs
/// [`harvest`](Self::harvest) is right at any time, with the vCPUs running or stopped. When it has returned, every page written before it
/// began is marked in the bitmap, and each page it marked is write-protected again, so that a later write is in a later
/// harvest. Hence the order for a copy of a *running* guest: harvest, take the marks out, copy those pages, and again.
/// A page written while it is copied may be copied torn: a later harvest has it. The last round, for an image
/// of one instant, needs the vCPUs stopped *before* its harvest, and every device thread that writes guest memory too.
///
/// A vCPU is stopped when `KVM_RUN` has returned: what the processor logged by itself (Intel's PML) KVM has added by then.
///
/// # What is in the log
/// The guest's writes, the processor's own to the guest's page tables (accessed and dirty bits), and KVM's (the page of kvmclock).
/// A page that the guest reads for the first time may be in it too, since KVM maps it writable at once.
/// Not the host's writes: [`GuestRam::write`](crate::GuestRam::write) marks them itself.
#[derive(Debug)]
pub struct DirtyLog {
    slots: Arc<RamSlots>,
    reprotect: Reprotect,
    /// One harvest at a time: of two that run together, each would have only a part of the log.
    harvesting: Mutex<()>,
}

/// When KVM protects logged pages against the next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reprotect {
    /// As they are read from the log (`KVM_GET_DIRTY_LOG` alone): every KVM has it.
    WhenRead,
    /// Only when told to, once they are marked in the bitmap (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, Linux 5.0 and 5.2):
    /// the log itself keeps what could not be marked.
    ///
    /// `KVM_DIRTY_LOG_INITIALLY_SET` isn't asked for: with it the first harvest would report all of RAM.
    WhenMarked,
}

/// What one harvest found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Harvest {
    /// Pages that the log reported, each counted whether or not it was marked already.
    pub pages: u64,
    /// The size of such a page in bytes: the host's.
    pub page_size: u64,
}

impl DirtyLog {
    /// Switches the log on for every slot, in the best way this KVM offers.
    ///
    /// # Errors
    /// [`StartError`]. Slots may be left with the log on, which costs speed and nothing else.
    pub fn start(slots: &Arc<RamSlots>) -> Result<Self, StartError> {
        let reprotect = if offers_manual_protect(slots) {
            Reprotect::WhenMarked
        } else {
            Reprotect::WhenRead
        };
        Self::start_with(slots, reprotect)
    }

    /// Switches the log on for every slot. How pages are protected again holds for the whole virtual machine.
    ///
    /// # Errors
    /// As [`start`](Self::start), and [`StartError::NoManualProtect`].
    pub fn start_with(slots: &Arc<RamSlots>, reprotect: Reprotect) -> Result<Self, StartError> {
        if offers_manual_protect(slots) {
            // Said either way: somebody may have switched it before.
            let enable = match reprotect {
                Reprotect::WhenRead => 0,
                Reprotect::WhenMarked => u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),
            };
            let capability = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [enable, 0, 0, 0],
                ..kvm_enable_cap::default()
            };
            slots
                .vm()
                .enable_cap(&capability)
                .map_err(|error| StartError::EnableManualProtect(error.into()))?;
        } else if reprotect == Reprotect::WhenMarked {
            return Err(StartError::NoManualProtect);
        }
        for region in slots.ram().layout().regions() {
            slots.log_dirty_pages(region, true)?;
        }
        Ok(Self {
            slots: Arc::clone(slots),
            reprotect,
            harvesting: Mutex::new(()),
        })
    }

    /// When KVM protects logged pages again.
    #[must_use]
    pub fn reprotect(&self) -> Reprotect {
        self.reprotect
    }

    /// The slots logged.
    #[must_use]
    pub fn slots(&self) -> &Arc<RamSlots> {
        &self.slots
    }

    /// Marks in `bitmap` every page that the log has, and has KVM log the next write to each.
    ///
    /// The bitmap covers the memory file ([`GuestRam::dirty_bitmap`](crate::GuestRam::dirty_bitmap) does) in pages of any
    /// size; other threads may mark, drain and rebuild it meanwhile.
    ///
    /// # Errors
    /// [`HarvestError`]. No page is lost: one that was taken from KVM's log is marked in `bitmap`, the others are in the
    /// log still, and harvesting again continues. A save that fails after the harvest keeps its marks by the bitmap's
    /// [epoch](dirty_bitmap::Epoch).
    pub fn harvest(&self, bitmap: &DirtyBitmap) -> Result<Harvest, HarvestError> {
        let _one_at_a_time = self
            .harvesting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ram = self.slots.ram();
        let base = marking_base(ram.layout(), bitmap)?;
        let mut harvest = Harvest {
            pages: 0,
            page_size: sys::page_size(),
        };
        for region in ram.layout().regions() {
            harvest.pages += self.harvest_region(region, base, bitmap)?;
        }
        Ok(harvest)
    }

    /// Switches the log off: the guest writes at full speed again.
    ///
    /// What was written since the last harvest is forgotten. A later diff would miss it: the next snapshot is a full one.
    ///
    /// # Errors
    /// [`SlotError`]; some slots may still be logged.
    pub fn stop(self) -> Result<(), SlotError> {
        for region in self.slots.ram().layout().regions() {
            self.slots.log_dirty_pages(region, false)?;
        }
        Ok(())
    }

    fn harvest_region(
        &self,
        region: &RamRange,
        base: u64,
        bitmap: &DirtyBitmap,
    ) -> Result<u64, HarvestError> {
        let slot = self.slots.slot_of(region);
        let words = self
            .slots
            .vm()
            .get_dirty_log(slot, region.size as usize)
            .map_err(|error| HarvestError::Get {
                slot,
                source: error.into(),
            })?;
        let mark = || {
            bitmap
                .mark_log(base + region.offset, sys::page_size(), &words)
                .map_err(|source| HarvestError::Mark { slot, source })
        };
        // With `WhenRead` the log is empty now, and the marks are all there is: nothing may come in between.
        let pages = mark()?;
        if self.reprotect == Reprotect::WhenMarked && pages > 0 {
            let cleared = self.clear(region, slot, &words);
            // Once more. Between the mark and the clearing a page was not yet protected: another thread may have taken
            // the mark out and copied the page, and then the guest written it, which the clearing forgot.
            mark()?;
            cleared?;
        }
        Ok(pages)
    }

    /// Has KVM forget the pages in `words`, no others, and protect them.
    fn clear(&self, region: &RamRange, slot: u32, words: &[u64]) -> Result<(), HarvestError> {
        let pages = region.size / sys::page_size();
        for (chunk, words) in words.chunks(CLEAR_PAGES / 64).enumerate() {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            // A chunk starts at a multiple of 64 and ends at one or at the slot's end, as the call demands.
            let first = chunk * CLEAR_PAGES;
            let count = (pages - first as u64).min(CLEAR_PAGES as u64) as u32;
            sys::clear_dirty_log(self.slots.vm(), slot, first as u64, count, words).map_err(
                |errno| HarvestError::Clear {
                    slot,
                    source: errno.into(),
                },
            )?;
        }
        Ok(())
    }
}

fn offers_manual_protect(slots: &RamSlots) -> bool {
    let offered = slots
        .vm()
        .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    offered > 0 && offered as u32 & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
}

/// The dirty log can't be switched on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// This KVM has no `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    #[error(
        "this KVM can't protect logged pages on demand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, Linux 5.2): use `DirtyLog::start`, \
         which takes what there is"
    )]
    NoManualProtect,
    /// KVM offers the capability and refuses to enable it.
    #[error("KVM offers KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 and refuses to set it")]
    EnableManualProtect(#[source] io::Error),
    /// A slot can't be logged.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// The dirty log can't be read to its end. No page is lost: see [`DirtyLog::harvest`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HarvestError {
    /// The bitmap is another guest's.
    #[error(transparent)]
    BitmapMismatch(#[from] BitmapMismatch),
    /// `KVM_GET_DIRTY_LOG` failed.
    #[error(
        "KVM_GET_DIRTY_LOG of memory slot {slot} failed: the slot is gone, or its log was switched off, by somebody else"
    )]
    Get {
        /// The slot number.
        slot: u32,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// `KVM_CLEAR_DIRTY_LOG` failed.
    #[error(
        "KVM_CLEAR_DIRTY_LOG of memory slot {slot} failed: its pages are marked, and will be once more by the next harvest"
    )]
    Clear {
        /// The slot number.
        slot: u32,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// The bitmap refused a part of the log; the rest of that slot's log is marked.
    #[error("the log of memory slot {slot} does not fit the bitmap")]
    Mark {
        /// The slot number.
        slot: u32,
        /// What the bitmap said.
        #[source]
        source: dirty_bitmap::DirtyLogError,
    },
}
