//! Moves KVM's dirty log into a bitmap.

mod epochs;
mod errors;
mod options;

use std::sync::{Arc, Mutex, PoisonError};

use guest_ram::host_page_size;
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
use page_reader::RamRange;

use super::slots::{RamSlots, SlotError};
use super::vcpus::Paused;
use options::HostWrites;

pub use epochs::PausedHarvest;
pub use errors::{HarvestError, LogEpochError, StartError};
pub use options::DirtyLogOptions;

/// The number of pages that one call clears: 1 GiB in pages of 4 KiB. During the call, KVM holds
/// the lock of the guest's page tables, and vCPUs that fault wait.
const CLEAR_PAGES: usize = 1 << 18;

/// KVM's log of the pages that a guest writes.
///
/// A harvest moves the log into the [bitmap of the guest's RAM][bitmap], in which the host's writes
/// are marked too. Only a harvest makes an epoch of that bitmap, because the pages in the log are
/// not in the bitmap before.
///
/// The log is on from [`start`](Self::start) until [`stop`](Self::stop). Dropping the value leaves
/// the log on, and the next `start` finds its contents. No log contains the writes before the first
/// `start`, so `start` marks all of the RAM. A chain of snapshots therefore begins with a full one,
/// of an epoch begun after `start`.
///
/// A guest that was restored continues its chain: start the log, restore the snapshot, and discard
/// the marks by [`set_baseline`](guest_ram::GuestRam::set_baseline). The first diff then has the
/// pages that were written since the restore, and its parent is the restored snapshot.
///
/// The RAM of a guest has one log at a time: two logs would take pages from each other.
///
/// [Stopping](Self::stop) the log or dropping the slots discards its contents, so both mark all of
/// the RAM. To have only the written pages in the last snapshot, harvest before.
///
/// # Running vCPUs
/// [`harvest_live`](Self::harvest_live) may be called at any time. When it returns, every page that
/// was written before the call is marked in the bitmap. Each page that it marked is write-protected
/// again, so a later write is in a later harvest. The order for a copy of a *running* guest is
/// therefore: harvest, take the marks, copy those pages, repeat.
/// [`begin_live_epoch`](Self::begin_live_epoch) and [`extend_live`](Self::extend_live) make the
/// first two steps. A page that is written while it is copied may be torn: a later harvest reports
/// it. The last round, for a consistent image, is [`harvest`](Self::harvest). It takes a
/// [`Paused`], which exists only when every vCPU has left the guest and has completed its I/O.
/// Every device thread that writes guest memory must have stopped, too.
///
/// A vCPU has left the guest when `KVM_RUN` has returned. KVM has then added what the processor
/// itself logged (Intel's PML).
///
/// # Contents of the log
/// The log has the guest's writes, the processor's own writes to the guest's page tables (accessed
/// and dirty bits), and KVM's writes (the page of kvmclock). It may also have a page that the guest
/// reads for the first time, since KVM maps that page writable at once.
///
/// <div class="warning">
///
/// Your devices' writes are not in the log: it has none of the host's writes.
/// [`GuestRam::write`](guest_ram::GuestRam::write) marks them itself. Guest memory of the crate
/// `vm-memory` with `AtomicBitmap`s needs [`DirtyLogOptions::mark_host_writes`]. For all others see
/// the [documentation of the crate](crate#writes-of-the-host).
///
/// </div>
///
/// [bitmap]: guest_ram::GuestRam::dirty_bitmap
#[derive(Debug)]
#[must_use = "a dirty log that is dropped can neither be harvested nor stopped"]
pub struct DirtyLog {
    slots: Arc<RamSlots>,
    reprotect: Reprotect,
    host_writes: HostWrites,
    /// Serializes harvests: two that run together would each have a part of the marks. The elements
    /// say, for each region, whether the last attempt to read its log failed.
    harvesting: Mutex<Box<[bool]>>,
    _claim: Claim,
}

/// The claim that makes a log the only one of its RAM.
#[derive(Debug)]
struct Claim(Arc<RamSlots>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.ram().log().claimed = false;
    }
}

/// The time at which KVM protects logged pages against the next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reprotect {
    /// KVM protects the pages as they are read from the log (`KVM_GET_DIRTY_LOG` alone). Every KVM
    /// supports this.
    WhenRead,
    /// KVM protects the pages on request, after they are marked in the bitmap
    /// (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, Linux 5.0 and 5.2). Pages that could not be marked
    /// stay in the log.
    ///
    /// `KVM_DIRTY_LOG_INITIALLY_SET` is not enabled: with it the first harvest would report all of
    /// the RAM.
    WhenMarked,
}

/// The numbers of one harvest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HarvestStats {
    /// The number of pages that the log reported, including those that were marked already.
    pub pages: u64,
    /// The size of such a page in bytes: the page size of the host.
    pub page_size: u64,
}

impl DirtyLog {
    /// Switches the log on for every slot, with the best [`Reprotect`] that this KVM offers. Marks
    /// all of the RAM, unless the log has been on since an earlier `DirtyLog`.
    ///
    /// All host writes must be marked in the bitmap as they are made; otherwise use
    /// [`options`](Self::options).
    ///
    /// # Errors
    /// Returns a [`StartError`]: [`MarksElsewhere`](StartError::MarksElsewhere) if the RAM is guest
    /// memory of `vm-memory` with `AtomicBitmap`s. The log of some slots may stay on, which only
    /// costs speed.
    pub fn start(slots: &Arc<RamSlots>) -> Result<Self, StartError> {
        DirtyLogOptions::default().start(slots)
    }

    /// Returns a builder for non-default options.
    pub fn options() -> DirtyLogOptions {
        DirtyLogOptions::default()
    }

    fn start_with(
        slots: &Arc<RamSlots>,
        reprotect: Option<Reprotect>,
        host_writes: HostWrites,
    ) -> Result<Self, StartError> {
        if slots.ram().marks_elsewhere() && !host_writes.are_marked() {
            return Err(StartError::MarksElsewhere);
        }
        let offered = offers_manual_protect(slots);
        let reprotect = reprotect.unwrap_or(match offered {
            true => Reprotect::WhenMarked,
            false => Reprotect::WhenRead,
        });
        let claim = {
            let mut log = slots.ram().log();
            if log.claimed {
                return Err(StartError::AlreadyStarted);
            }
            log.claimed = true;
            Claim(Arc::clone(slots))
        };
        if offered {
            // Set in both cases: the VMM may have changed it before.
            let enable = match reprotect {
                Reprotect::WhenRead => 0,
                Reprotect::WhenMarked => u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),
            };
            slots
                .machine()
                .enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, enable)
                .map_err(StartError::EnableManualProtect)?;
        } else if reprotect == Reprotect::WhenMarked {
            return Err(StartError::NoManualProtect);
        }
        slots.set_logged();
        for region in slots.ram().layout().regions() {
            slots.log_dirty_pages(region, true)?;
        }
        // No log contains earlier writes. Of slots that belong to the caller it is not known
        // whether the log has stayed on.
        let was_on = std::mem::replace(&mut slots.ram().log().on, slots.are_own());
        if !(was_on && slots.are_own()) {
            slots.ram().mark_all();
        }
        Ok(Self {
            slots: Arc::clone(slots),
            reprotect,
            host_writes,
            harvesting: Mutex::new(vec![false; slots.ram().layout().regions().len()].into()),
            _claim: claim,
        })
    }

    /// Returns the time at which KVM protects logged pages again.
    #[must_use]
    pub fn reprotect(&self) -> Reprotect {
        self.reprotect
    }

    /// Returns the slots that are logged.
    #[must_use]
    pub fn slots(&self) -> &Arc<RamSlots> {
        &self.slots
    }

    /// Marks every page in the log and protects it again, while the vCPUs are paused: the last
    /// harvest of a consistent image.
    ///
    /// The vCPUs stay paused until the returned value is dropped. On an error they may run at once.
    ///
    /// # Errors
    /// Returns the errors of [`harvest_live`](Self::harvest_live), and
    /// [`HarvestError::OtherMachine`].
    pub fn harvest(&self, paused: Paused) -> Result<PausedHarvest, HarvestError> {
        if !Arc::ptr_eq(paused.machine(), self.slots.machine()) {
            return Err(HarvestError::OtherMachine);
        }
        let stats = self.harvest_live()?;
        Ok(PausedHarvest::new(stats, Arc::clone(&self.slots), paused))
    }

    /// Marks every page in the log and protects it again, while the guest may run. The pages may be
    /// copied, but they are not a consistent image.
    ///
    /// Then calls the function of [`DirtyLogOptions::mark_host_writes`], if there is one.
    ///
    /// <div class="warning">
    ///
    /// A VMM that switches the dirty logging of a slot off and on again between two harvests loses
    /// the pages of that time, and no error reports it: KVM discards the log of the slot. The same
    /// holds for a slot that is removed and set again. This breaks the contract of
    /// [`RamSlots::adopt`].
    ///
    /// </div>
    ///
    /// # Errors
    /// Returns a [`HarvestError`]. No page is lost: a page that was taken from KVM's log is marked
    /// in the bitmap, the others are still in the log, and the next harvest continues. If the log
    /// of a slot could not be read because the VMM had switched it off, all pages of the slot are
    /// marked once it can be read again. A save that fails after the harvest keeps its marks
    /// through the bitmap's [epoch](dirty_bitmap::Epoch).
    pub fn harvest_live(&self) -> Result<HarvestStats, HarvestError> {
        let mut unreadable = self
            .harvesting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut harvest = HarvestStats {
            pages: 0,
            page_size: host_page_size(),
        };
        for region in self.slots.ram().layout().regions() {
            harvest.pages += self.harvest_region(region, &mut unreadable[region.region])?;
        }
        // While the harvest is locked: a harvest that ends in another thread must not precede marks
        // that are taken from their place and not yet in the bitmap.
        self.host_writes.mark(self.slots.ram().dirty_bitmap())?;
        Ok(harvest)
    }

    /// Switches the log off. The guest then writes at full speed again.
    ///
    /// Marks all of the RAM, even on an error, since the log that ends here may hold writes since
    /// the last harvest. Later writes are in no log: the next [`start`](Self::start) marks all of
    /// the RAM again, and so does dropping the slots ([`RamSlots`]).
    ///
    /// # Errors
    /// Returns a [`SlotError`]. Some slots may still be logged.
    pub fn stop(self) -> Result<(), SlotError> {
        let ram = self.slots.ram();
        ram.log().on = false;
        let mut regions = ram.layout().regions().iter();
        let stopped = regions.try_for_each(|region| self.slots.log_dirty_pages(region, false));
        // Mark after the log is off: every write that the log held or missed until now precedes the
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
            .machine()
            .dirty_log(slot, region.size / host_page_size())
            .map_err(|source| {
                *unreadable = true;
                self.slots.ram().log().on = false;
                HarvestError::Get { slot, source }
            })?;
        // The log was off, or the slot was removed: no log has the writes of that time.
        if std::mem::take(unreadable) {
            self.slots.ram().mark_region(region);
        }
        let mark = || {
            bitmap
                .mark_dirty_log(bitmap.ram_start() + region.offset, host_page_size(), &words)
                .map_err(|source| HarvestError::Mark { slot, source })
        };
        // With `WhenRead` the log is empty now, and only the marks remain: nothing may come in
        // between.
        let pages = mark()?;
        if self.reprotect == Reprotect::WhenMarked && pages > 0 {
            let cleared = self.clear(region, slot, &words);
            // Mark again. Between the mark and the clearing a page was not yet protected: another
            // thread may have taken the mark and copied the page, and then the guest wrote it, and
            // the clearing dropped that write from the log.
            mark()?;
            cleared?;
        }
        Ok(pages)
    }

    /// Clears the pages in `words` in KVM's log, no others, and protects them.
    fn clear(&self, region: &RamRange, slot: u32, words: &[u64]) -> Result<(), HarvestError> {
        let pages = region.size / host_page_size();
        for (chunk, words) in words.chunks(CLEAR_PAGES / 64).enumerate() {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            // As the call requires, a chunk starts at a multiple of 64, and ends at one or at the
            // slot's end.
            let first = chunk * CLEAR_PAGES;
            let count = (pages - first as u64).min(CLEAR_PAGES as u64) as u32;
            self.slots
                .machine()
                .clear_dirty_log(slot, first as u64, count, words)
                .map_err(|source| HarvestError::Clear { slot, source })?;
        }
        Ok(())
    }
}

fn offers_manual_protect(slots: &RamSlots) -> bool {
    let offered = slots
        .machine()
        .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    offered > 0 && offered as u32 & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
}
