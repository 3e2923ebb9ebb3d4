//! The virtual machine of this process.

use std::io;
use std::sync::Arc;

use applevisor::vm::{GicDisabled, VirtualMachine, VirtualMachineInstance};
use applevisor_sys::hv_error_t;
use thiserror::Error;

use super::errors::HvError;
#[cfg(feature = "macos-15")]
use super::gic_place::{GicPlace, MsiRegion};
use super::pause::VcpuSet;
use super::sys;

/// The default page size of stage 2 in bytes. It is also the page size of the host.
pub const PAGE_SIZE: u64 = applevisor_sys::PAGE_SIZE as u64;

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
    pub(crate) vcpus: Arc<VcpuSet>,
}

#[derive(Clone, Debug)]
pub(crate) enum Instance {
    Plain(
        #[allow(dead_code, reason = "held until it is dropped")]
        VirtualMachineInstance<GicDisabled>,
    ),
    #[cfg(feature = "macos-15")]
    Gic(VirtualMachineInstance<applevisor::vm::GicEnabled>),
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
}

impl VmOptions {
    /// Sets the number of bits of guest-physical addresses (macOS 13). RAM above 64 GiB needs more
    /// than the default of 36.
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

    /// Creates the machine.
    ///
    /// # Errors
    /// Returns the same errors as [`Vm::new`].
    pub fn create(&self) -> Result<Vm, CreateVmError> {
        if !sys::hypervisor_support().map_err(CreateVmError::Sysctl)? {
            return Err(CreateVmError::NoHypervisor);
        }
        let (instance, granule) = self.instance()?;
        Ok(Vm {
            instance,
            granule,
            vcpus: Arc::default(),
        })
    }

    #[cfg(not(feature = "macos-13"))]
    fn instance(&self) -> Result<(Instance, u64), CreateVmError> {
        let instance = VirtualMachine::new().map_err(HvError::in_call("hv_vm_create"))?;
        Ok((Instance::Plain(instance), PAGE_SIZE))
    }

    #[cfg(feature = "macos-13")]
    fn instance(&self) -> Result<(Instance, u64), CreateVmError> {
        let mut config = applevisor::vm::VirtualMachineConfig::new();
        if let Some(bits) = self.address_bits {
            let set = config.set_ipa_size(bits);
            set.map_err(HvError::in_call("hv_vm_config_set_ipa_size"))?;
        }
        #[cfg_attr(not(feature = "macos-26"), allow(unused_mut))]
        let mut granule = PAGE_SIZE;
        #[cfg(feature = "macos-26")]
        if self.small_pages {
            let set = config.set_ipa_granule(applevisor::vm::IpaGranule::HV_IPA_GRANULE_4KB);
            set.map_err(HvError::in_call("hv_vm_config_set_ipa_granule"))?;
            granule = 4096;
        }
        #[cfg(feature = "macos-15")]
        if let Some(place) = self.gic {
            let gic = place.config(self.msis)?;
            let instance = VirtualMachine::with_gic(config, gic);
            let instance = instance.map_err(HvError::in_call("hv_vm_create or hv_gic_create"))?;
            return Ok((Instance::Gic(instance), granule));
        }
        let instance =
            VirtualMachine::with_config(config).map_err(HvError::in_call("hv_vm_create"))?;
        Ok((Instance::Plain(instance), granule))
    }
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

/// An error for a virtual machine that could not be created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CreateVmError {
    /// The host offers no hypervisor.
    #[error(
        "this Mac offers no hypervisor (sysctl kern.hv_support is 0): if it is a virtual machine, \
         enable nested virtualization on its host"
    )]
    NoHypervisor,
    /// The support for a hypervisor could not be read.
    #[error("failed to read sysctl kern.hv_support: {0}")]
    Sysctl(#[source] io::Error),
    /// The process may not use the hypervisor.
    #[error(
        "this program may not use the hypervisor: sign it with the entitlement \
         com.apple.security.hypervisor (codesign --sign - --force --entitlements FILE PROGRAM); a \
         cargo `runner` can do this for every program that cargo runs: {0}"
    )]
    NotEntitled(#[source] HvError),
    /// The process already has a virtual machine.
    #[error(
        "this process already has a virtual machine, and the framework supports only one: drop \
         that machine, its vCPUs and its stage 2 first, or run the other guest in a process of its \
         own: {0}"
    )]
    Exists(#[source] HvError),
    /// This Mac or this version of macOS does not support an option.
    #[error(
        "this Mac does not support such a virtual machine: use fewer address bits, or omit options \
         that need a newer macOS: {0}"
    )]
    Unsupported(#[source] HvError),
    /// The framework refused for another reason.
    #[error("failed to create a virtual machine: {0}")]
    Refused(#[source] HvError),
}

impl From<HvError> for CreateVmError {
    fn from(error: HvError) -> Self {
        match error {
            error if error.is(hv_error_t::HV_DENIED) => Self::NotEntitled(error),
            error if error.is(hv_error_t::HV_BUSY) => Self::Exists(error),
            error if error.is(hv_error_t::HV_UNSUPPORTED) => Self::Unsupported(error),
            error => Self::Refused(error),
        }
    }
}
