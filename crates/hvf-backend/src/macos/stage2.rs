//! Guest RAM in the second stage of address translation, and its write protection.
//!
//! The framework keeps host addresses, not the memory behind them. RAM therefore stays mapped in
//! this process until the framework has confirmed its removal from stage 2. If it never confirms
//! it, the RAM stays mapped until the process ends.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use applevisor_sys::{
    HV_MEMORY_EXEC, HV_MEMORY_READ, HV_MEMORY_WRITE, hv_memory_flags_t, hv_vm_map, hv_vm_protect,
    hv_vm_unmap,
};
use dirty_bitmap::{Policy, WriteProtection};
use page_reader::{OutsideRam, RamRange};
use thiserror::Error;

use super::errors::HvError;
use super::sys;
use super::vm::Vm;
use crate::ram::GuestRam;
use crate::tracker::{Stage2Tracker, Stage2TrackerError};

/// The permissions of an unprotected page.
///
/// These are the flags of the framework, because `applevisor` passes `MemPerms` as the number of
/// its variant, and `ReadWrite` would become EXEC.
const UNPROTECTED: hv_memory_flags_t = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;

/// The permissions of a write-protected page.
const PROTECTED: hv_memory_flags_t = HV_MEMORY_READ | HV_MEMORY_EXEC;

/// Guest RAM that is mapped into the guest of a virtual machine, with its write protection.
///
/// As a [`WriteProtection`], it takes ranges of the memory file. A range across a gap in
/// guest-physical memory takes two calls of the framework. The framework does not document whether
/// two threads may make these calls at once, so a lock serializes them.
///
/// Dropping it removes the RAM from the guest, and a vCPU that is still running faults. The RAM is
/// unmapped from the process afterwards.
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
/// let epoch = tracker.checkpoint()?; // from now on, the guest's first write to each page exits
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the guest loses its memory when this is dropped"]
pub struct Stage2 {
    ram: Arc<GuestRam>,
    /// Serializes the calls that change permissions.
    permissions: Mutex<()>,
    /// The number of mapped regions. They are the first ones of the layout.
    mapped: usize,
    /// The last field, so that `hv_vm_destroy` is called after `hv_vm_unmap`.
    vm: Vm,
}

impl Stage2 {
    /// Maps the RAM into the guest, readable, writable and executable.
    ///
    /// Processes that this one forks do not inherit the RAM. Otherwise a fork would make it
    /// copy-on-write, and the next write of the host would replace a page that the guest keeps.
    ///
    /// The framework keeps the pages that the memory has now. Mapping something else over it
    /// (`mmap` with `MAP_FIXED`) leaves the guest on the old pages, so a restore into RAM that is
    /// mapped writes into the memory. Adopted memory of a file is a private mapping if the file is
    /// open read-only, because the guest must be able to write it.
    ///
    /// # Errors
    /// Returns [`MapError`]. The regions that were already mapped are unmapped again.
    pub fn map(vm: &Vm, ram: &Arc<GuestRam>) -> Result<Self, MapError> {
        let mut stage2 = Self::unmapped(vm, ram)?;
        for region in ram.layout().regions() {
            let host = ram.host_address(region.region).as_ptr().cast();
            // SAFETY: the region is mapped at this address.
            unsafe { sys::keep_from_children(host, region.size as usize) }
                .map_err(MapError::Inherit)?;
            // SAFETY: the address is that of the region's mapping, which is as large as the region
            // (checked when the RAM was created, or by the contract of `adopt`). `stage2.ram`
            // keeps it mapped, and `drop` releases it only after the framework has.
            let code =
                unsafe { hv_vm_map(host, region.guest_start, region.size as usize, UNPROTECTED) };
            HvError::check("hv_vm_map", code).map_err(|source| MapError::Refused {
                guest_start: region.guest_start,
                size: region.size,
                address_bits: vm.address_bits(),
                source,
            })?;
            stage2.mapped += 1;
        }
        Ok(stage2)
    }

    /// Adopts RAM that the VMM has mapped into the guest itself (`hv_vm_map`), readable, writable
    /// and executable. Nothing is mapped, and dropping the value unmaps nothing.
    ///
    /// [`Stage2Tracker::stop`] makes the RAM writable again.
    ///
    /// # Errors
    /// Returns [`MapError::PageBelowGranule`] if the pages of the bitmap are smaller than those of
    /// stage 2.
    ///
    /// # Safety
    /// While the value exists, the RAM is mapped into the guest of `vm`, at the addresses of its
    /// layout. Processes that this one forks do not inherit it (see [`map`](Self::map)), or the VMM
    /// forks none.
    pub unsafe fn adopt(vm: &Vm, ram: &Arc<GuestRam>) -> Result<Self, MapError> {
        Self::unmapped(vm, ram)
    }

    fn unmapped(vm: &Vm, ram: &Arc<GuestRam>) -> Result<Self, MapError> {
        let (granule, page_size) = (vm.granule(), ram.dirty_bitmap().page_size());
        if page_size < granule {
            return Err(MapError::PageBelowGranule { page_size, granule });
        }
        Ok(Self {
            ram: Arc::clone(ram),
            permissions: Mutex::new(()),
            mapped: 0,
            vm: vm.clone(),
        })
    }

    /// Creates a tracker that marks the guest's writes in the bitmap of the RAM. `GuestRam` marks
    /// the host's writes there too.
    ///
    /// See [`Stage2Tracker::new`].
    ///
    /// # Errors
    /// Returns [`Stage2TrackerError`]. No page was marked.
    pub fn track(self, policy: Policy) -> Result<Stage2Tracker<Self>, Stage2TrackerError> {
        let ram = Arc::clone(&self.ram);
        Stage2Tracker::new(ram.layout().clone(), ram.dirty_bitmap(), policy, self)
    }

    /// Makes the guest execute the code that the host has written to these offsets in the memory
    /// file.
    ///
    /// Call this after code was replaced that the guest may have executed, as by a restore into the
    /// RAM of a machine that has run, and before a vCPU runs again. Macs have instruction caches
    /// that are not coherent with writes (CTR_EL0.DIC is 0).
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if the range is not inside the RAM. Nothing was invalidated.
    pub fn invalidate_instructions(&self, range: Range<u64>) -> Result<(), OutsideRam> {
        let size = range.end.saturating_sub(range.start);
        for piece in self.ram.layout().offset_pieces(range.start, size)? {
            let region = self.ram.layout().regions()[piece.region];
            let host = self.ram.host_address(piece.region).as_ptr();
            let host = host.wrapping_add((piece.guest_start - region.guest_start) as usize);
            // SAFETY: the piece is inside the mapping of its region.
            unsafe { sys::sys_icache_invalidate(host.cast(), piece.size as usize) };
        }
        Ok(())
    }

    /// Returns the RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Returns the virtual machine.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    fn set_permissions(
        &self,
        range: Range<u64>,
        flags: hv_memory_flags_t,
    ) -> Result<(), ProtectError> {
        let granule = self.vm.granule();
        if !(range.start | range.end).is_multiple_of(granule) {
            return Err(ProtectError::Misaligned { range, granule });
        }
        let size = range.end.saturating_sub(range.start);
        let pieces = self.ram.layout().offset_pieces(range.start, size)?;
        // The lock guards no data, so a panic of another thread leaves nothing inconsistent.
        let _serialized = self
            .permissions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for RamRange {
            guest_start, size, ..
        } in pieces
        {
            // SAFETY: `self.vm` exists, and the piece is RAM that `map` mapped into it, by the
            // layout. The call only changes the guest's permissions.
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
        self.set_permissions(range, PROTECTED)
    }

    fn unprotect(&self, range: Range<u64>) -> Result<(), ProtectError> {
        self.set_permissions(range, UNPROTECTED)
    }
}

impl Drop for Stage2 {
    fn drop(&mut self) {
        for region in &self.ram.layout().regions()[..self.mapped] {
            // SAFETY: `map` mapped this region into the guest, and `self.vm` still exists. A vCPU
            // that accesses it from now on exits with a fault.
            let code = unsafe { hv_vm_unmap(region.guest_start, region.size as usize) };
            if code != 0 {
                // A vCPU may still write to the memory, so it must never be reused.
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
    }
}

/// An error for mapping RAM into a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// The pages of the bitmap are smaller than those of stage 2.
    #[error(
        "the bitmap has pages of {page_size} bytes, but stage 2 has pages of {granule} bytes: \
         create the bitmap with pages of stage 2, or the machine with \
         `Vm::options().small_pages(true)`"
    )]
    PageBelowGranule {
        /// The bitmap's page size in bytes.
        page_size: u64,
        /// The page size of stage 2 in bytes.
        granule: u64,
    },
    /// The RAM could not be kept from processes that this one forks.
    #[error("failed to keep guest RAM from forked processes (minherit): {0}")]
    Inherit(#[source] io::Error),
    /// The framework refused.
    #[error(
        "failed to map {size} bytes of RAM at guest-physical address {guest_start:#x}: choose \
         addresses without another mapping and below 2^{address_bits}, because the machine has \
         {address_bits} address bits (`Vm::options().address_bits(..)`): {source}"
    )]
    Refused {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The number of bits of the machine's guest-physical addresses.
        address_bits: u32,
        /// The error of the framework.
        #[source]
        source: HvError,
    },
}

/// An error for protecting or unprotecting a range of the RAM. Any part of the range may be
/// protected.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProtectError {
    /// The range does not begin and end at a page boundary.
    #[error(
        "the offsets {:#x}..{:#x} are not whole pages of stage 2: align them to {granule} bytes",
        range.start, range.end
    )]
    Misaligned {
        /// The offsets in the memory file.
        range: Range<u64>,
        /// The page size of stage 2 in bytes.
        granule: u64,
    },
    /// The range is not inside the RAM.
    #[error(transparent)]
    OutsideRam(#[from] OutsideRam),
    /// The framework refused.
    #[error(
        "failed to change the permissions of {size} bytes at guest-physical address \
         {guest_start:#x}: {source}"
    )]
    Refused {
        /// The guest-physical start of the part that failed.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The error of the framework.
        #[source]
        source: HvError,
    },
}
