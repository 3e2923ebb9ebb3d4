//! Guest RAM in the second stage of address translation, and its write protection.
//!
//! The framework keeps host addresses, not the memory behind them. So RAM stays mapped in this process until the framework has confirmed that
//! it is out of stage 2; if it never does, for ever.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_memory_flags_t, hv_vm_map, hv_vm_protect,
    hv_vm_unmap,
};
use dirty_bitmap::{Policy, WriteProtection};
use page_reader::{OutsideRam, RamRange};
use thiserror::Error;

use super::error::HvError;
use super::ram::GuestRam;
use super::vm::Vm;
use crate::{Stage2Tracker, TrackError};

/// What a page may be used for while writes to it go through.
///
/// The flags themselves: `applevisor::MemPerms` reaches the framework as the number of its variant, so that `ReadWrite` would be EXEC.
const OPEN: hv_memory_flags_t = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;

/// What it may be used for while the next write to it faults.
const PROTECTED: hv_memory_flags_t = HV_MEMORY_READ | HV_MEMORY_EXEC;

/// Guest RAM, given to the guest of a virtual machine, and its write protection.
///
/// As a [`WriteProtection`] it takes ranges of the memory file: what lies on both sides of a gap in guest-physical memory is two calls. The
/// framework does not say whether these may come from two threads at once, so they wait for each other.
///
/// Dropped, it takes the RAM out of the guest: a vCPU still running finds no memory. The RAM is unmapped only after that.
///
/// # Examples
/// ```no_run
/// use std::sync::Arc;
///
/// use dirty_bitmap::Policy;
/// use hvf_backend::{GuestRam, Stage2, Vm};
/// use page_reader::RamLayout;
///
/// let vm = Vm::new()?;
/// let ram = Arc::new(GuestRam::new(RamLayout::single(0x8000_0000, 1 << 30)?)?);
/// let stage2 = Stage2::map(&vm, &ram)?;
/// let tracker = stage2.track(Policy::default())?;
/// let epoch = tracker.arm()?; // from here on, the guest's first write to a page leaves it
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Stage2 {
    ram: Arc<GuestRam>,
    /// Held while the framework changes permissions.
    changing: Mutex<()>,
    /// How many regions are in it: the first ones.
    mapped: usize,
    /// Last: `hv_vm_destroy` comes after `hv_vm_unmap`.
    vm: Vm,
}

impl Stage2 {
    /// Gives the RAM to the guest, readable, writable and executable.
    ///
    /// # Errors
    /// [`MapError`]. The regions mapped before the one that failed are taken out again.
    pub fn map(vm: &Vm, ram: &Arc<GuestRam>) -> Result<Self, MapError> {
        let (granule, page_size) = (vm.granule(), ram.dirty_bitmap().page_size());
        if page_size < granule {
            return Err(MapError::PageBelowGranule { page_size, granule });
        }
        let mut stage2 = Self {
            ram: Arc::clone(ram),
            changing: Mutex::new(()),
            mapped: 0,
            vm: vm.clone(),
        };
        for region in ram.layout().regions() {
            let host = ram.host_address(region.region).cast_const().cast();
            // SAFETY: the address is that of the region's mapping, which is as large as the region (by construction of GuestRam, or the
            // promise of its adopter). `stage2.ram` keeps it mapped, and `drop` lets go of it only after the framework has.
            let code = unsafe { hv_vm_map(host, region.guest_start, region.size as usize, OPEN) };
            HvError::check("hv_vm_map", code).map_err(|source| MapError::Refused {
                guest_start: region.guest_start,
                size: region.size,
                source,
            })?;
            stage2.mapped += 1;
        }
        Ok(stage2)
    }

    /// Tracks the writes to it in the bitmap of its RAM, where the host's writes are marked too: see [`Stage2Tracker::new`].
    ///
    /// # Errors
    /// [`TrackError`]. Nothing was marked.
    pub fn track(self, policy: Policy) -> Result<Stage2Tracker<Self>, TrackError> {
        let ram = Arc::clone(&self.ram);
        Stage2Tracker::new(ram.layout().clone(), ram.dirty_bitmap(), policy, self)
    }

    /// The RAM in it.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    fn set(&self, range: Range<u64>, flags: hv_memory_flags_t) -> Result<(), ProtectError> {
        let granule = self.vm.granule();
        if !(range.start | range.end).is_multiple_of(granule) {
            return Err(ProtectError::Misaligned { range, granule });
        }
        let size = range.end.saturating_sub(range.start);
        let pieces = self.ram.layout().offset_pieces(range.start, size)?;
        // It guards no data: a panic elsewhere has left nothing half-done.
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        for RamRange {
            guest_start, size, ..
        } in pieces
        {
            // SAFETY: `self.vm` lives, and the piece is of RAM that `map` gave it (by the layout). What changes is what the guest may do.
            let code = unsafe { hv_vm_protect(guest_start, size as usize, flags) };
            HvError::check("hv_vm_protect", code).map_err(|source| ProtectError::Refused {
                guest_start,
                size,
                source,
            })?;
        }
        Ok(())
    }
}

impl WriteProtection for Stage2 {
    type Error = ProtectError;

    fn protect(&self, range: Range<u64>) -> Result<(), ProtectError> {
        self.set(range, PROTECTED)
    }

    fn lift(&self, range: Range<u64>) -> Result<(), ProtectError> {
        self.set(range, OPEN)
    }
}

impl Drop for Stage2 {
    fn drop(&mut self) {
        for region in &self.ram.layout().regions()[..self.mapped] {
            // SAFETY: `map` gave the guest this region, and `self.vm` still lives. A vCPU that uses it from now on leaves with a fault.
            let code = unsafe { hv_vm_unmap(region.guest_start, region.size as usize) };
            if code != 0 {
                // A vCPU may still write there, so the memory must never become anything else.
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
    }
}

/// The guest can't have this RAM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// Writes are to be tracked in smaller pages than stage 2 has.
    #[error(
        "writes can't be tracked in pages of {page_size} bytes where stage 2 has pages of {granule}: make the dirty bitmap with \
         those, or the machine with `Vm::options().small_pages()`"
    )]
    PageBelowGranule {
        /// The bitmap's page size in bytes.
        page_size: u64,
        /// That of stage 2.
        granule: u64,
    },
    /// The framework refused.
    #[error(
        "the guest can't have {size:#x} bytes of RAM at guest-physical {guest_start:#x}: another mapping may be there, or it \
         is past the machine's addresses (`Vm::options().address_bits(..)`; by default 36 bits, 64 GiB)"
    )]
    Refused {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// What the framework said.
        #[source]
        source: HvError,
    },
}

/// A range of the RAM could not be protected, or its protection not be lifted: part of it may be protected then, and part not.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProtectError {
    /// The range does not begin and end with a page.
    #[error(
        "offsets {:#x}..{:#x} are no whole pages of stage 2, which are {granule} bytes", range.start, range.end
    )]
    Misaligned {
        /// The offsets in the memory file.
        range: Range<u64>,
        /// The page of stage 2 in bytes.
        granule: u64,
    },
    /// The range is not RAM, or not all of it.
    #[error(transparent)]
    OutsideRam(#[from] OutsideRam),
    /// The framework refused.
    #[error("the framework did not change {size:#x} bytes at guest-physical {guest_start:#x}")]
    Refused {
        /// The guest-physical start of the piece.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// What the framework said.
        #[source]
        source: HvError,
    },
}
