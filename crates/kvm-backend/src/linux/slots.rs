//! The registration of guest RAM in a virtual machine's memory slots.
//!
//! RAM stays mapped until KVM has confirmed that its slot is removed. If KVM never confirms it, the
//! RAM is never unmapped. The reason: KVM keeps a host address, not the memory behind it. If that
//! memory were unmapped and other memory mapped in its place, the guest would write there. No owner
//! can know that the guest has ended, since vCPU descriptors keep the virtual machine alive after
//! its own descriptor is closed.

#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use page_reader::RamRange;
use thiserror::Error;

use super::machine::{Machine, Slots};
use super::ram::GuestRam;

/// Guest RAM, each region in a memory slot of a virtual machine.
///
/// Dropping the value removes the slots from the virtual machine: a vCPU that still runs finds no
/// memory. The RAM is unmapped only after that. If a [`DirtyLog`](crate::DirtyLog) of these slots
/// was ever started, all of the RAM is marked then: no readable log contains the writes since the
/// last harvest, or after the log was stopped.
///
/// The value has a descriptor of its own for the virtual machine, which therefore exists at least
/// as long as the value. The VMM keeps its `VmFd` in any way.
///
/// # Slot numbers
/// A slot of a virtual machine is in one `RamSlots` at a time: a second one for the same number is
/// [`SlotError::InUse`]. KVM itself refuses only other memory in the slot. It accepts the same
/// memory again, also at another guest-physical address, and the drop of either value would take
/// the memory from the guest of the other.
///
/// Only the `RamSlots` of this process are compared. A slot that the VMM sets by
/// `KVM_SET_USER_MEMORY_REGION` itself, or that another process sets, is not known here: do not
/// pass its number to [`register`](Self::register).
///
/// # Regions and slots
/// Each region of the RAM's layout is one slot. If a VMM splits its memory over several slots, the
/// layout has a region for each of them. Adjacent regions stay separate in a
/// [`RamLayout`](page_reader::RamLayout), and the memory file has no gap between them.
///
/// # Memory added later
/// The layout of a `GuestRam` is fixed, so its slots are too. Memory that is plugged in later is a
/// new RAM with a larger layout, and a new chain of snapshots, which begins with a full one:
///
/// 1. The VMM maps the memory and sets its slot.
/// 2. It drops the `DirtyLog` and the `RamSlots` of the old RAM. [Adopted](Self::adopt) slots stay
///    registered, and the guest may run.
/// 3. It adopts all of the memory as one RAM, and all of the slots, and starts a log of them. All
///    of the RAM is marked then.
///
/// [Registered](Self::register) slots are removed when the value is dropped, so a VMM with hot-plug
/// adopts its slots.
///
/// # Examples
/// ```no_run
/// use std::sync::Arc;
/// use kvm_backend::{DirtyLog, GuestRam, RamSlots};
/// use page_reader::RamLayout;
///
/// let vm = kvm_backend::create_vm(&kvm_backend::open_kvm()?)?;
/// let ram = Arc::new(GuestRam::new(RamLayout::x86_with_gap(4 << 30)?)?);
/// let slots = Arc::new(RamSlots::register(&vm, &ram, 0)?); // slots 0 and 1
/// let log = DirtyLog::start(&slots)?;
/// // ... run vCPUs ...
/// log.harvest_live()?; // marks in `ram.dirty_bitmap()`
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the guest loses its memory when the slots are dropped"]
pub struct RamSlots {
    /// Slot `i` has region `i`.
    slots: Slots,
    ram: Arc<GuestRam>,
    /// Whether this value registered the slots, not the caller.
    own: bool,
    /// The number of slots to remove on drop: those of the first regions.
    registered: usize,
    /// Whether a dirty log of these slots was started.
    logged: AtomicBool,
}

impl RamSlots {
    /// Registers the RAM with the virtual machine: region `i` becomes memory slot `first_slot + i`,
    /// readable, writable and executable.
    ///
    /// # Errors
    /// Returns a [`SlotError`]. The slots that this call registered are removed again.
    pub fn register(vm: &VmFd, ram: &Arc<GuestRam>, first_slot: u32) -> Result<Self, SlotError> {
        let regions = ram.layout().regions().len() as u64;
        let numbers: Vec<_> = (u64::from(first_slot)..).take(regions as usize).collect();
        let mut slots = Self::named(vm, ram, &numbers)?;
        // A second registration would switch off the log of the existing slots, which discards its
        // contents.
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

    /// Uses slots that the caller has registered and removes: of exactly these regions and host
    /// addresses. `slots` has one slot number for each region, in the order of the layout.
    ///
    /// # Errors
    /// Returns [`SlotError::SlotCount`], [`SlotError::SlotNumber`], [`SlotError::InUse`] or
    /// [`SlotError::Descriptor`]. Numbers of other slots are not noticed here: the start of a
    /// [`DirtyLog`](crate::DirtyLog) then fails with [`SlotError::Overlap`] or
    /// [`SlotError::Refused`].
    ///
    /// # Safety
    /// As long as the value exists, the slots are registered as described, without
    /// `KVM_MEM_READONLY` or a guest memory file: a [`DirtyLog`](crate::DirtyLog) replaces their
    /// flags when it starts and stops, and the caller changes none of them in between. The memory
    /// in a slot stays mapped until the caller has removed the slot, even after the value is
    /// dropped.
    ///
    /// # Examples
    /// A VMM whose RAM is in its slots 3 and 7:
    /// ```no_run
    /// use std::sync::Arc;
    /// use kvm_backend::{DirtyLog, GuestRam, RamSlots};
    /// # use page_reader::RamLayout;
    ///
    /// # fn example(vm: kvm_ioctls::VmFd) -> Result<(), Box<dyn std::error::Error>> {
    /// # let ram = GuestRam::new(RamLayout::new([(0, 1 << 20), (4 << 30, 1 << 20)])?)?;
    /// let ram = Arc::new(ram); // of two regions
    /// // SAFETY: the VMM has set both slots to the memory of `ram`, and removes them before it
    /// // unmaps the memory.
    /// let slots = Arc::new(unsafe { RamSlots::adopt(&vm, &ram, &[3, 7]) }?);
    /// let log = DirtyLog::start(&slots)?;
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn adopt(vm: &VmFd, ram: &Arc<GuestRam>, slots: &[u32]) -> Result<Self, SlotError> {
        let numbers: Vec<_> = slots.iter().copied().map(u64::from).collect();
        Self::named(vm, ram, &numbers)
    }

    /// Returns whether this value registered the slots, so that nothing else sets their flags.
    pub(crate) fn are_own(&self) -> bool {
        self.own
    }

    /// Returns the RAM in the slots.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Returns the virtual machine.
    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.slots.machine
    }

    /// Records that a dirty log of these slots is about to start.
    pub(crate) fn set_logged(&self) {
        self.logged.store(true, Ordering::Relaxed);
    }

    /// Returns the memory slot of a region.
    pub(crate) fn slot_of(&self, region: &RamRange) -> u32 {
        self.slots.numbers[region.region]
    }

    /// Switches KVM's dirty log of a region's slot. A log that is on already keeps its contents
    /// when it is switched on.
    pub(crate) fn log_dirty_pages(&self, region: &RamRange, on: bool) -> Result<(), SlotError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.set(region, region.size, flags)
    }

    fn named(vm: &VmFd, ram: &Arc<GuestRam>, numbers: &[u64]) -> Result<Self, SlotError> {
        let (given, regions) = (numbers.len(), ram.layout().regions().len());
        if given != regions {
            return Err(SlotError::SlotCount { given, regions });
        }
        let machine = Machine::of(vm).map_err(SlotError::Descriptor)?;
        // The upper 16 bits of a slot number are the address space, which here is 0.
        let limit = machine.check_extension(Cap::NrMemslots).max(0) as u64;
        if let Some(slot) = numbers.iter().copied().filter(|slot| *slot >= limit).max() {
            return Err(SlotError::SlotNumber { slot, limit });
        }
        // Below the limit, which is positive and fits in an `i32`.
        let numbers: Vec<_> = numbers.iter().map(|slot| *slot as u32).collect();
        let taken = machine.take_slots(&numbers);
        Ok(Self {
            slots: taken.map_err(|slot| SlotError::InUse { slot })?,
            ram: Arc::clone(ram),
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
            userspace_addr: self.ram.host_address(region.region).addr().get() as u64,
        };
        // SAFETY: the address is that of the region's mapping, which is as large as the region (by
        // construction of GuestRam, or by the contract of its adopter). `self.ram` keeps it mapped,
        // and `drop` releases `self.ram` only after KVM has removed the slot. KVM refuses overlaps
        // with other slots.
        unsafe { self.machine().set_slot(&memory) }.map_err(|source| {
            let (guest_start, size) = (region.guest_start, region.size);
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
            // Size 0 deletes the slot: when the call returns, no vCPU uses it any more.
            if self.set(region, 0, 0).is_err() {
                // A vCPU may still write there, so the memory must never be unmapped and reused.
                std::mem::forget(Arc::clone(&self.ram));
            }
        }
        if self.are_own() {
            // Removed slots have no log.
            let mut log = self.ram.log();
            (log.on, log.registered) = (false, false);
        }
        if *self.logged.get_mut() {
            // Mark last: no vCPU writes through these slots any more.
            self.ram.mark_all();
        }
    }
}

/// An error of registering guest RAM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SlotError {
    /// The slot number is above the limit of this KVM.
    #[error("no memory slot {slot}: the slots of this KVM are below {limit}; begin lower")]
    SlotNumber {
        /// The highest slot number that the RAM needs.
        slot: u64,
        /// The number of slots of KVM.
        limit: u64,
    },
    /// The number of slots is not the number of regions.
    #[error(
        "the number of memory slots ({given}) is not that of the RAM regions ({regions}): pass one \
         for each region, in the order of the layout"
    )]
    SlotCount {
        /// The number of slots passed.
        given: usize,
        /// The number of regions in the layout.
        regions: usize,
    },
    /// Another [`RamSlots`] of this virtual machine has the slot, or the slot is passed twice.
    #[error(
        "memory slot {slot} of this virtual machine is in use by another RamSlots, or was passed \
         twice: share that RamSlots, drop it first, or use another slot number"
    )]
    InUse {
        /// The slot number.
        slot: u32,
    },
    /// The descriptor of the virtual machine can't be duplicated.
    #[error(
        "failed to duplicate the descriptor of the virtual machine: check the limit of open files \
         (ulimit -n): {0}"
    )]
    Descriptor(#[source] io::Error),
    /// The RAM is registered by another `RamSlots`.
    #[error("the RAM is registered already: share that RamSlots, or drop it first")]
    AlreadyRegistered,
    /// Another slot contains some of these guest-physical addresses.
    #[error(
        "memory slot {slot} for {size} bytes at guest-physical {guest_start:#x} overlaps \
         another slot: leave a gap in the layout for that slot, or remove it first; for adopted \
         slots, pass the numbers that these slots have: {source}"
    )]
    Overlap {
        /// The slot number.
        slot: u32,
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
    /// KVM refused for another reason.
    #[error(
        "KVM refused memory slot {slot} for {size} bytes at guest-physical \
         {guest_start:#x}: the slot number may be in use, or the address above the guest's \
         physical address width; for adopted slots, pass the numbers that these slots have, in \
         the order of the layout: {source}"
    )]
    Refused {
        /// The slot number.
        slot: u32,
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The error of KVM.
        #[source]
        source: io::Error,
    },
}
