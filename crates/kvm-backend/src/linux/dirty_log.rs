//! KVM's dirty log, moved into a bitmap.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use page_reader::RamRange;
use thiserror::Error;

use super::slots::{RamSlots, SlotError};
use super::sys;
use super::vcpus::Paused;

/// Pages cleared by one call: 1 GiB in pages of 4 KiB. KVM holds the guest's page-table lock meanwhile, and vCPUs that fault wait.
const CLEAR_PAGES: usize = 1 << 18;

/// KVM's log of the pages that a guest writes.
///
/// A harvest moves it into the [bitmap of the guest's RAM](crate::GuestRam::dirty_bitmap), where the host's writes are marked too.
///
/// On from [`start`](Self::start) until [`stop`](Self::stop): a value that is merely dropped leaves the log on, and the next
/// `start` finds what it holds. What was written before the first `start` is in no log, so `start` marks all of the RAM. The
/// chain of snapshots begins with a full one, of an epoch begun after `start`.
///
/// A guest's RAM has one log at a time: of two, each would take pages that the other never sees.
///
/// A log that ends takes what it holds with it. So all of the RAM is marked when the log is
/// [stopped](Self::stop) and when the slots are dropped. To have only the written pages in the last
/// snapshot, harvest before.
///
/// # Running vCPUs
/// [`harvest_running`](Self::harvest_running) may come at any time. When it has returned, every page written before it
/// began is marked in the bitmap, and each page it marked is write-protected again, so that a later write is in a later
/// harvest. Hence the order for a copy of a *running* guest: harvest, take the marks out, copy those pages, and again.
/// A page written while it is copied may be copied torn: a later harvest has it. The last round, for an image
/// of one instant, is [`harvest`](Self::harvest). It takes a [`Paused`], which there is only when every vCPU has left the guest
/// and completed its I/O. Every device thread that writes guest memory must have stopped, too.
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
    /// One harvest at a time: of two that run together, each would have only a part of the log. For each region, whether its log
    /// could not be read the last time.
    harvesting: Mutex<Box<[bool]>>,
    _claim: Claim,
}

/// What makes a log the only one of its RAM.
#[derive(Debug)]
struct Claim(Arc<RamSlots>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.ram().log().claimed = false;
    }
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

/// What the last harvest of a paused guest found. The vCPUs stay paused as long as it lives: drop it when the pages are copied.
#[derive(Debug)]
#[must_use = "dropped, it lets the vCPUs run"]
pub struct PausedHarvest {
    found: Harvest,
    _paused: Paused,
}

impl PausedHarvest {
    /// What was found.
    #[must_use]
    pub fn found(&self) -> Harvest {
        self.found
    }
}

impl DirtyLog {
    /// Switches the log on for every slot, in the best way this KVM offers. All of the RAM is marked then, unless the log has been on
    /// since an earlier `DirtyLog`.
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
        let claim = {
            let mut log = slots.ram().log();
            if log.claimed {
                return Err(StartError::AlreadyStarted);
            }
            log.claimed = true;
            Claim(Arc::clone(slots))
        };
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
        slots.set_logged();
        for region in slots.ram().layout().regions() {
            slots.log_dirty_pages(region, true)?;
        }
        // What was written before is in no log. Whether that of slots that are the caller's has stayed on is not known.
        let was_on = std::mem::replace(&mut slots.ram().log().on, slots.are_own());
        if !(was_on && slots.are_own()) {
            slots.ram().mark_all();
        }
        Ok(Self {
            slots: Arc::clone(slots),
            reprotect,
            harvesting: Mutex::new(vec![false; slots.ram().layout().regions().len()].into()),
            _claim: claim,
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

    /// Marks every page that the log has, and has KVM log the next write to each: the last harvest of an image of one instant.
    ///
    /// The vCPUs stay paused until what it returns is dropped; on an error they may run at once.
    ///
    /// # Errors
    /// As [`harvest_running`](Self::harvest_running), and [`HarvestError::OtherMachine`].
    pub fn harvest(&self, paused: Paused) -> Result<PausedHarvest, HarvestError> {
        if !Arc::ptr_eq(paused.vm(), self.slots.vm()) {
            return Err(HarvestError::OtherMachine);
        }
        Ok(PausedHarvest {
            found: self.harvest_running()?,
            _paused: paused,
        })
    }

    /// The same of a guest that may run: what it finds may be copied, and is not of one instant.
    ///
    /// # Errors
    /// [`HarvestError`]. No page is lost: one that was taken from KVM's log is marked in the bitmap, the others are in the
    /// log still, and harvesting again continues. Where the log of a slot could not be read, since something else had switched it
    /// off, all pages of the slot are marked once it can be read again. A save that fails after the harvest keeps its marks by the bitmap's
    /// [epoch](dirty_bitmap::Epoch).
    pub fn harvest_running(&self) -> Result<Harvest, HarvestError> {
        let mut unreadable = self
            .harvesting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut harvest = Harvest {
            pages: 0,
            page_size: sys::page_size(),
        };
        for region in self.slots.ram().layout().regions() {
            harvest.pages += self.harvest_region(region, &mut unreadable[region.region])?;
        }
        Ok(harvest)
    }

    /// Switches the log off: the guest writes at full speed again.
    ///
    /// All of the RAM is marked, on an error too, as what was written since the last harvest is in
    /// the log that ends here. What is written from here on is in no log: the next
    /// [`start`](Self::start) marks all of the RAM again, and so does the end of the slots
    /// ([`RamSlots`]).
    ///
    /// # Errors
    /// [`SlotError`]; some slots may still be logged.
    pub fn stop(self) -> Result<(), SlotError> {
        let ram = self.slots.ram();
        ram.log().on = false;
        let mut regions = ram.layout().regions().iter();
        let stopped = regions.try_for_each(|region| self.slots.log_dirty_pages(region, false));
        // After that: what is written meanwhile is in the log still, or was written before the
        // mark.
        ram.mark_all();
        stopped
    }

    fn harvest_region(
        &self,
        region: &RamRange,
        unreadable: &mut bool,
    ) -> Result<u64, HarvestError> {
        let bitmap = self.slots.ram().dirty_bitmap();
        let slot = self.slots.slot_of(region);
        let words = self
            .slots
            .vm()
            .get_dirty_log(slot, region.size as usize)
            .map_err(|error| {
                *unreadable = true;
                self.slots.ram().log().on = false;
                HarvestError::Get {
                    slot,
                    source: error.into(),
                }
            })?;
        // Its log was off, or its slot gone: what was written meanwhile is in no log.
        if std::mem::take(unreadable) {
            self.slots.ram().mark_all_of(region);
        }
        let mark = || {
            bitmap
                .mark_log(bitmap.ram_start() + region.offset, sys::page_size(), &words)
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
    /// This RAM has a log.
    #[error("the dirty log of this RAM was started already: use that DirtyLog, or drop it first")]
    AlreadyStarted,
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
    /// The vCPUs that are paused are another machine's. Nothing was harvested.
    #[error(
        "the paused vCPUs are of another virtual machine than the logged slots: pause those of this one"
    )]
    OtherMachine,
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
