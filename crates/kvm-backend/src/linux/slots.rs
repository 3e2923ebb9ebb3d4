//! Guest RAM in a virtual machine's memory slots.
//!
//! KVM keeps a host address, not the memory behind it: were that unmapped, and something else mapped in its place, the
//! guest would write there. vCPU descriptors keep the virtual machine alive whatever happens to its own, so that no
//! owner can know that the guest has ended. The rule here is therefore the other way round: RAM stays mapped
//! until KVM has confirmed that the slot is gone; if it never does, for ever.

#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use page_reader::RamRange;
use thiserror::Error;

use super::ram::GuestRam;

/// Guest RAM, each region in a memory slot of a virtual machine.
///
/// Dropped, it takes the slots out of the virtual machine: a vCPU still running finds no memory.
/// The RAM is unmapped only after that. If a [`DirtyLog`](crate::DirtyLog) of these slots was ever
/// started, all of the RAM is marked then: what was written since the last harvest, or after the
/// log was stopped, is in no log that could be read.
///
/// # Examples
/// ```no_run
/// use std::sync::Arc;
/// use kvm_backend::{DirtyLog, GuestRam, RamSlots};
/// use page_reader::RamLayout;
///
/// let vm = Arc::new(kvm_backend::create_vm(&kvm_backend::open_kvm()?)?);
/// let ram = Arc::new(GuestRam::new(RamLayout::x86_with_gap(4 << 30)?)?);
/// let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?); // slots 0 and 1
/// let log = DirtyLog::start(&slots)?;
/// // ... run vCPUs ...
/// log.harvest_running()?; // marks in `ram.dirty_bitmap()`
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RamSlots {
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    first_slot: u32,
    /// Whether the slots are ours, not the caller's.
    own: bool,
    /// How many are ours to take out again: those of the first regions.
    registered: usize,
    /// Whether a dirty log of these slots was started.
    logged: AtomicBool,
}

impl RamSlots {
    /// Gives the RAM to the guest: region `i` becomes memory slot `first_slot + i`, readable, writable and executable.
    ///
    /// # Errors
    /// [`SlotError`]. The slots registered before the one that failed are taken out again.
    pub fn register(
        vm: &Arc<VmFd>,
        ram: &Arc<GuestRam>,
        first_slot: u32,
    ) -> Result<Self, SlotError> {
        let mut slots = Self::named(vm, ram, first_slot)?;
        // Done once more, it would switch off the log of the slots that there are, which forgets what it holds.
        if std::mem::replace(&mut ram.log().registered, true) {
            return Err(SlotError::AlreadyRegistered);
        }
        slots.own = true;
        for region in ram.layout().regions() {
            slots.set(region, region.size, 0)?;
            slots.registered += 1;
        }
        Ok(slots)
    }

    /// Names slots that the caller has registered already, and will take out again: of exactly these regions and
    /// host addresses, region `i` in slot `first_slot + i`.
    ///
    /// # Errors
    /// [`SlotError::SlotNumber`].
    ///
    /// # Safety
    /// As long as the value lives, the slots are registered as said, without `KVM_MEM_READONLY` or a guest memory file:
    /// their flags are set anew when a [`DirtyLog`](crate::DirtyLog) starts and stops. Memory that is in a slot stays mapped, also once the value is
    /// gone, until the caller has taken the slot out.
    pub unsafe fn adopt(
        vm: &Arc<VmFd>,
        ram: &Arc<GuestRam>,
        first_slot: u32,
    ) -> Result<Self, SlotError> {
        Self::named(vm, ram, first_slot)
    }

    /// Whether nothing else sets the slots' flags.
    pub(crate) fn are_own(&self) -> bool {
        self.own
    }

    /// The RAM in the slots.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Notes that a dirty log of these slots is about to start.
    pub(crate) fn set_logged(&self) {
        self.logged.store(true, Ordering::Relaxed);
    }

    /// The memory slot of a region.
    pub(crate) fn slot_of(&self, region: &RamRange) -> u32 {
        self.first_slot + region.region as u32
    }

    /// Switches KVM's dirty log for a region's slot. On while it is on already, it keeps what it holds.
    pub(crate) fn log_dirty_pages(&self, region: &RamRange, on: bool) -> Result<(), SlotError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.set(region, region.size, flags)
    }

    fn named(vm: &Arc<VmFd>, ram: &Arc<GuestRam>, first_slot: u32) -> Result<Self, SlotError> {
        // The upper 16 bits of a slot number are the address space, which here is 0.
        let limit = vm.check_extension_int(Cap::NrMemslots).max(0) as u64;
        let end = u64::from(first_slot) + ram.layout().regions().len() as u64;
        if end > limit {
            return Err(SlotError::SlotNumber {
                slot: end - 1,
                limit,
            });
        }
        Ok(Self {
            vm: Arc::clone(vm),
            ram: Arc::clone(ram),
            first_slot,
            own: false,
            registered: 0,
            logged: AtomicBool::new(false),
        })
    }

    fn set(&self, region: &RamRange, size: u64, flags: u32) -> Result<(), SlotError> {
        let slot = self.slot_of(region);
        let memory = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.guest_start,
            memory_size: size,
            userspace_addr: self.ram.host_address(region.region) as u64,
        };
        // SAFETY: the address is that of the region's mapping, which is as large as the region (by construction of
        // GuestRam, or the promise of its adopter). `self.ram` keeps it mapped, and `drop` lets go of `self.ram` only
        // after KVM has let go of the slot. Overlaps with other slots KVM refuses.
        unsafe { self.vm.set_user_memory_region(memory) }.map_err(|error| {
            let (guest_start, size) = (region.guest_start, region.size);
            let source = io::Error::from(error);
            match source.kind() {
                io::ErrorKind::AlreadyExists => SlotError::Overlap {
                    slot,
                    guest_start,
                    size,
                    source,
                },
                _ => SlotError::Refused {
                    slot,
                    guest_start,
                    size,
                    source,
                },
            }
        })
    }
}

impl Drop for RamSlots {
    fn drop(&mut self) {
        for region in &self.ram.layout().regions()[..self.registered] {
            // A slot of size 0 is a slot deleted: when the call returns, no vCPU uses it any more.
            if self.set(region, 0, 0).is_err() {
                // A vCPU may still write there, so the memory must never become anything else.
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
        if self.are_own() {
            // Slots that are gone have no log.
            let mut log = self.ram.log();
            (log.on, log.registered) = (false, false);
        }
        if *self.logged.get_mut() {
            // Last: no vCPU writes by these slots any more.
            self.ram.mark_all();
        }
    }
}

/// KVM does not take guest RAM as it is.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SlotError {
    /// A slot number that this KVM doesn't have.
    #[error("memory slot {slot}: this KVM has slots 0 to {limit} exclusive, so begin lower")]
    SlotNumber {
        /// The highest slot number needed.
        slot: u64,
        /// How many slots KVM has.
        limit: u64,
    },
    /// The RAM is in the slots of another `RamSlots`.
    #[error("the RAM is registered already: share that RamSlots, or drop it first")]
    AlreadyRegistered,
    /// Another slot has some of these guest-physical addresses.
    #[error(
        "memory slot {slot} for {size:#x} bytes at guest-physical {guest_start:#x} overlaps another slot: \
         leave a gap in the layout for what is there, or take that slot out first"
    )]
    Overlap {
        /// The slot number.
        slot: u32,
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
    /// KVM refused for another reason.
    #[error(
        "KVM refused memory slot {slot} for {size:#x} bytes at guest-physical {guest_start:#x}: \
         the slot number may be in use, or the address past the guest's physical address width"
    )]
    Refused {
        /// The slot number.
        slot: u32,
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
}
