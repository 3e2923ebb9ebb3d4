//! The virtual machine of this process.

use std::io;

use applevisor::vm::{GicDisabled, VirtualMachine, VirtualMachineInstance};
use applevisor_sys::hv_error_t;
use thiserror::Error;

use super::error::HvError;
use super::sys;

/// The page of stage 2 unless the machine was given a smaller one, in bytes: that of the host.
pub const PAGE_SIZE: u64 = applevisor_sys::PAGE_SIZE as u64;

/// The virtual machine of this process: the framework has one at a time. Clones are the same machine, which ends with the last of them, and of what
/// was made from it: [`Vcpu`](crate::Vcpu), [`Stage2`](crate::Stage2).
///
/// # Examples
/// ```no_run
/// let vm = hvf_backend::Vm::new()?;
/// let vcpu = vm.create_vcpu()?; // of this thread
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Vm {
    /// Ends the machine when its last clone drops.
    #[cfg_attr(not(feature = "macos-15"), expect(dead_code))]
    pub(crate) instance: Instance,
    granule: u64,
}

#[derive(Clone, Debug)]
pub(crate) enum Instance {
    Plain(#[allow(dead_code, reason = "held for its drop")] VirtualMachineInstance<GicDisabled>),
    #[cfg(feature = "macos-15")]
    Gic(VirtualMachineInstance<applevisor::vm::GicEnabled>),
}

/// How a virtual machine is made: [`Vm::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `create`"]
pub struct VmOptions {
    #[cfg(feature = "macos-13")]
    address_bits: Option<u32>,
    #[cfg(feature = "macos-15")]
    gic: Option<super::gic::GicPlace>,
    #[cfg(feature = "macos-26")]
    small_pages: bool,
}

impl Vm {
    /// Makes the virtual machine of this process, as the framework has it by default: guest-physical addresses of 36 bits, no interrupt controller,
    /// stage 2 in pages of 16 KiB.
    ///
    /// # Errors
    /// [`CreateVmError`] tells what is missing: the hypervisor, the entitlement, or that the process has a virtual machine already.
    pub fn new() -> Result<Self, CreateVmError> {
        Self::options().create()
    }

    /// Says how the machine is to be made.
    pub fn options() -> VmOptions {
        VmOptions::default()
    }

    /// The page of stage 2 in bytes: what a tracker can protect at least.
    #[must_use]
    pub fn granule(&self) -> u64 {
        self.granule
    }
}

impl VmOptions {
    /// Gives the guest physical addresses of so many bits (macOS 13). RAM above 64 GiB takes more than the 36 of the default.
    #[cfg(feature = "macos-13")]
    pub fn address_bits(mut self, bits: u32) -> Self {
        self.address_bits = Some(bits);
        self
    }

    /// Gives the machine the framework's interrupt controller, a GICv3 (macOS 15). Its addresses must not be RAM.
    #[cfg(feature = "macos-15")]
    pub fn gic(mut self, place: super::gic::GicPlace) -> Self {
        self.gic = Some(place);
        self
    }

    /// Has stage 2 in pages of 4 KiB (macOS 26): four times the faults, a quarter of the bytes.
    #[cfg(feature = "macos-26")]
    pub fn small_pages(mut self) -> Self {
        self.small_pages = true;
        self
    }

    /// Makes the machine.
    ///
    /// # Errors
    /// As [`Vm::new`].
    pub fn create(self) -> Result<Vm, CreateVmError> {
        if !sys::hypervisor_support().map_err(CreateVmError::Sysctl)? {
            return Err(CreateVmError::NoHypervisor);
        }
        let (instance, granule) = self.instance()?;
        Ok(Vm { instance, granule })
    }

    #[cfg(not(feature = "macos-13"))]
    fn instance(self) -> Result<(Instance, u64), CreateVmError> {
        let instance = VirtualMachine::new().map_err(HvError::of("hv_vm_create"))?;
        Ok((Instance::Plain(instance), PAGE_SIZE))
    }

    #[cfg(feature = "macos-13")]
    fn instance(self) -> Result<(Instance, u64), CreateVmError> {
        let mut config = applevisor::vm::VirtualMachineConfig::new();
        if let Some(bits) = self.address_bits {
            let set = config.set_ipa_size(bits);
            set.map_err(HvError::of("hv_vm_config_set_ipa_size"))?;
        }
        #[cfg_attr(not(feature = "macos-26"), allow(unused_mut))]
        let mut granule = PAGE_SIZE;
        #[cfg(feature = "macos-26")]
        if self.small_pages {
            let set = config.set_ipa_granule(applevisor::vm::IpaGranule::HV_IPA_GRANULE_4KB);
            set.map_err(HvError::of("hv_vm_config_set_ipa_granule"))?;
            granule = 4096;
        }
        #[cfg(feature = "macos-15")]
        if let Some(place) = self.gic {
            let gic = place.config()?;
            let instance = VirtualMachine::with_gic(config, gic);
            let instance = instance.map_err(HvError::of("hv_vm_create or hv_gic_create"))?;
            return Ok((Instance::Gic(instance), granule));
        }
        let instance = VirtualMachine::with_config(config).map_err(HvError::of("hv_vm_create"))?;
        Ok((Instance::Plain(instance), granule))
    }
}

/// Whether this machine has a hypervisor for processes (`sysctl kern.hv_support`): every Mac of Apple silicon has, a macOS in a virtual machine may not.
///
/// # Errors
/// What `sysctlbyname(3)` says.
pub fn has_hypervisor() -> io::Result<bool> {
    sys::hypervisor_support()
}

/// No virtual machine can be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CreateVmError {
    /// There is no hypervisor for processes here.
    #[error(
        "this Mac offers no hypervisor (sysctl kern.hv_support says 0): in a virtual machine, ask its host for nested virtualization"
    )]
    NoHypervisor,
    /// Whether there is a hypervisor can't be found out.
    #[error("can't ask for kern.hv_support")]
    Sysctl(#[source] io::Error),
    /// The process may not use the hypervisor.
    #[error(
        "this program may not use the hypervisor: sign it with the entitlement com.apple.security.hypervisor \
         (codesign --sign - --force --entitlements FILE PROGRAM), as a cargo `runner` can for every program that cargo runs"
    )]
    NotEntitled(#[source] HvError),
    /// The process has a virtual machine.
    #[error(
        "this process has a virtual machine already, and the framework has one for each: drop that one, its vCPUs and its \
         stage 2 first, or run the other guest in a process of its own"
    )]
    Exists(#[source] HvError),
    /// This macOS, or this Mac, does not have what was asked for.
    #[error(
        "this Mac can't make such a virtual machine: ask for fewer address bits, or leave out what a newer macOS brought"
    )]
    Unsupported(#[source] HvError),
    /// The framework refused for another reason.
    #[error("the framework makes no virtual machine")]
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
