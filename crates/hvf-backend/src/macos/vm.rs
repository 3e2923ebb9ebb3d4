//! The virtual machine of this process.

#![allow(unsafe_code)]

use std::any::Any;
use std::io;
use std::sync::Arc;

use applevisor_sys::hv_ipa_granule_t;

use super::create_error::CreateVmError;
use super::errors::HvError;
#[cfg(feature = "macos-15")]
use super::gic_place::{GicPlace, MsiRegion};
#[cfg(feature = "macos-15")]
use super::machine::GicInstance;
pub(crate) use super::machine::Instance;
use super::machine::{Machine, Object};
use super::newer;
use super::sys;
use super::vcpu_set::VcpuSet;
use crate::cpu_features::CpuFeatures;

/// The default page size of stage 2 in bytes. It is also the page size of the host.
pub const PAGE_SIZE: u64 = applevisor_sys::PAGE_SIZE as u64;

/// The bits of guest-physical addresses before macOS 13, which made them configurable.
const ADDRESS_BITS_BEFORE_13: u32 = 36;

/// The virtual machine of this process.
///
/// The framework supports one machine for each process at a time. Clones refer to the same machine.
/// It ends when the last clone is dropped, and the last [`Vcpu`](crate::Vcpu) and
/// [`Stage2`](crate::Stage2) created from it.
///
/// # Examples
/// ```no_run
/// let vm = hvf_backend::Vm::new()?;
/// let vcpu = vm.create_vcpu()?; // belongs to this thread
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "the virtual machine ends when its last clone is dropped"]
pub struct Vm {
    /// Ends the machine when its last clone is dropped.
    #[cfg_attr(not(feature = "macos-15"), expect(dead_code))]
    pub(crate) instance: Instance,
    granule: u64,
    address_bits: u32,
    /// Whether new vCPUs keep the scalable matrix extension.
    pub(super) sme: bool,
    /// What new vCPUs report, if it is not what the Mac has.
    pub(super) cpu_features: Option<CpuFeatures>,
    pub(crate) vcpus: Arc<VcpuSet>,
}

/// A builder for a virtual machine, returned by [`Vm::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `create`"]
pub struct VmOptions {
    #[cfg(feature = "macos-13")]
    address_bits: Option<u32>,
    #[cfg(feature = "macos-15")]
    gic: Option<GicPlace>,
    #[cfg(feature = "macos-15")]
    msis: Option<MsiRegion>,
    #[cfg(feature = "macos-26")]
    small_pages: bool,
    sme: bool,
    cpu_features: Option<CpuFeatures>,
}

impl Vm {
    /// Creates the virtual machine of this process with the defaults of the framework.
    ///
    /// These are guest-physical addresses of 36 bits, no interrupt controller, and stage 2 in pages
    /// of 16 KiB.
    ///
    /// # Errors
    /// Returns [`CreateVmError`] if the host has no hypervisor, if the program has no entitlement,
    /// or if the process already has a virtual machine.
    pub fn new() -> Result<Self, CreateVmError> {
        Self::options().create()
    }

    /// Returns a builder for a machine with other settings.
    pub fn options() -> VmOptions {
        VmOptions::default()
    }

    /// Returns the page size of stage 2 in bytes, which is the smallest unit that a tracker can
    /// protect.
    #[must_use]
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Returns the number of bits of guest-physical addresses.
    #[must_use]
    pub fn address_bits(&self) -> u32 {
        self.address_bits
    }

    /// Returns the largest number of bits of guest-physical addresses on this Mac, which differs
    /// between Macs. Before macOS 13, it is 36.
    ///
    /// # Errors
    /// Returns the [`HvError`] of the call.
    pub fn max_address_bits() -> Result<u32, HvError> {
        let Ok(get) = newer::hv_vm_config_get_max_ipa_size() else {
            return Ok(ADDRESS_BITS_BEFORE_13);
        };
        let mut bits = 0;
        // SAFETY: the address is of a variable.
        let code = unsafe { get(&raw mut bits) };
        HvError::check("hv_vm_config_get_max_ipa_size", code).map(|()| bits)
    }
}

impl VmOptions {
    /// Sets the number of bits of guest-physical addresses (macOS 13). RAM above 64 GiB needs more
    /// than the default of 36. The limit is [`Vm::max_address_bits`].
    #[cfg(feature = "macos-13")]
    pub fn address_bits(mut self, bits: u32) -> Self {
        self.address_bits = Some(bits);
        self
    }

    /// Adds the framework's interrupt controller, a GICv3 (macOS 15). Its addresses must not be
    /// RAM.
    #[cfg(feature = "macos-15")]
    pub fn gic(mut self, place: GicPlace) -> Self {
        self.gic = Some(place);
        self
    }

    /// Adds a region for message-signaled interrupts to the interrupt controller (macOS 15).
    /// Without [`gic`](Self::gic), it has no effect.
    #[cfg(feature = "macos-15")]
    pub fn gic_msis(mut self, region: MsiRegion) -> Self {
        self.msis = Some(region);
        self
    }

    /// Sets whether the page size of stage 2 is 4 KiB (macOS 26). Compared with 16 KiB, this can
    /// take four times the faults and a quarter of the bytes.
    #[cfg(feature = "macos-26")]
    pub fn small_pages(mut self, small_pages: bool) -> Self {
        self.small_pages = small_pages;
        self
    }

    /// Sets whether guests see the scalable matrix extension (SME) of an M4 or later. By default,
    /// it is hidden in ID_AA64PFR1_EL1 of each new vCPU.
    ///
    /// The state of a guest that uses it can be captured on macOS 15.2 or later, and restored on
    /// Macs with the same vector length.
    pub fn sme(mut self, sme: bool) -> Self {
        self.sme = sme;
        self
    }

    /// Sets the features that vCPUs report to the guest. By default, these are all that the Mac
    /// has.
    ///
    /// This is for guests that are restored on other Macs: see [`CpuFeatures`]. With features that
    /// this Mac does not have, [`create_vcpu`](Vm::create_vcpu) fails.
    pub fn cpu_features(mut self, features: CpuFeatures) -> Self {
        self.cpu_features = Some(features);
        self
    }

    /// Creates the machine.
    ///
    /// # Errors
    /// Returns the same errors as [`Vm::new`], and
    /// [`UnsupportedFunction`](CreateVmError::UnsupportedFunction) for an option that this macOS
    /// does not have.
    pub fn create(&self) -> Result<Vm, CreateVmError> {
        if !sys::hypervisor_support().map_err(CreateVmError::Sysctl)? {
            return Err(CreateVmError::NoHypervisor);
        }
        let address_bits = self.checked_address_bits()?;
        let granule = self.granule();
        let machine = Machine::create(self.config()?.as_ref())?;
        Ok(self.vm(self.instance(machine)?, granule, address_bits))
    }

    /// Returns a machine that another owner has created as these options state.
    pub(super) fn adopted(&self, owner: Arc<dyn Any + Send + Sync>) -> Result<Vm, CreateVmError> {
        let address_bits = self.checked_address_bits()?;
        let machine = Arc::new(Machine::Adopted(owner));
        #[cfg(feature = "macos-15")]
        if self.gic.is_some() {
            let instance = Instance::Gic(GicInstance::adopted(machine));
            return Ok(self.vm(instance, self.granule(), address_bits));
        }
        Ok(self.vm(Instance::Plain(machine), self.granule(), address_bits))
    }

    fn vm(&self, instance: Instance, granule: u64, address_bits: u32) -> Vm {
        Vm {
            instance,
            granule,
            address_bits,
            sme: self.sme,
            cpu_features: self.cpu_features.clone(),
            vcpus: Arc::default(),
        }
    }

    #[cfg(feature = "macos-13")]
    fn requested_bits(&self) -> Option<u32> {
        self.address_bits
    }

    #[cfg(feature = "macos-26")]
    fn granule(&self) -> u64 {
        if self.small_pages { 4096 } else { PAGE_SIZE }
    }

    /// Returns the bits of guest-physical addresses, of which this Mac has enough.
    fn checked_address_bits(&self) -> Result<u32, CreateVmError> {
        let Some(requested) = self.requested_bits() else {
            return Ok(default_address_bits()?);
        };
        let max = Vm::max_address_bits()?;
        if requested > max {
            return Err(CreateVmError::AddressBits { requested, max });
        }
        Ok(requested)
    }

    /// Returns the configuration, unless all settings are the defaults.
    fn config(&self) -> Result<Option<Object>, CreateVmError> {
        let bits = self.requested_bits();
        if bits.is_none() && self.granule() == PAGE_SIZE {
            return Ok(None);
        }
        let create = newer::hv_vm_config_create()?;
        // SAFETY: the function returns a new object.
        let config = unsafe { Object::create("hv_vm_config_create", create) }?;
        if let Some(bits) = bits {
            let set = newer::hv_vm_config_set_ipa_size()?;
            // SAFETY: the configuration exists.
            let code = unsafe { set(config.as_ptr(), bits) };
            HvError::check("hv_vm_config_set_ipa_size", code)?;
        }
        if self.granule() != PAGE_SIZE {
            let set = newer::hv_vm_config_set_ipa_granule()?;
            // SAFETY: the configuration exists.
            let code = unsafe { set(config.as_ptr(), hv_ipa_granule_t::HV_IPA_GRANULE_4KB) };
            HvError::check("hv_vm_config_set_ipa_granule", code)?;
        }
        Ok(Some(config))
    }

    #[cfg(feature = "macos-15")]
    fn instance(&self, machine: Arc<Machine>) -> Result<Instance, CreateVmError> {
        match self.gic {
            Some(place) => GicInstance::create(machine, place, self.msis).map(Instance::Gic),
            None => Ok(Instance::Plain(machine)),
        }
    }
}

fn default_address_bits() -> Result<u32, HvError> {
    let Ok(get) = newer::hv_vm_config_get_default_ipa_size() else {
        return Ok(ADDRESS_BITS_BEFORE_13);
    };
    let mut bits = 0;
    // SAFETY: the address is of a variable.
    let code = unsafe { get(&raw mut bits) };
    HvError::check("hv_vm_config_get_default_ipa_size", code).map(|()| bits)
}

/// Returns whether the host offers a hypervisor to processes (`sysctl kern.hv_support`).
///
/// Every Mac with Apple silicon does. macOS in a virtual machine may not.
///
/// # Errors
/// Returns the error of `sysctlbyname(3)`.
pub fn has_hypervisor() -> io::Result<bool> {
    sys::hypervisor_support()
}
