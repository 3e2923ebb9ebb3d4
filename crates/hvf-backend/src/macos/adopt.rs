//! Adopting the machine and the vCPUs that a VMM has created itself.

#![allow(unsafe_code)]

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use applevisor_sys::{hv_reg_t, hv_vcpu_exit_t};
use thiserror::Error;

use super::create_error::CreateVmError;
use super::errors::HvError;
use super::vcpu::Vcpu;
use super::vm::{Vm, VmOptions};
use crate::exit::{Exception, Exit};

impl VmOptions {
    /// Adopts the machine that this process has created by `hv_vm_create`. The options state what
    /// it is like: the bits of its guest-physical addresses, the page size of its stage 2, and
    /// whether it has an interrupt controller. Nothing is created, and dropping the [`Vm`] destroys
    /// nothing.
    ///
    /// `owner` is kept until the last clone of the [`Vm`], and the last vCPU and
    /// [`Stage2`](crate::Stage2) of it, is dropped. Pass `()` for a machine that lives until the
    /// process ends.
    ///
    /// Call this once for each machine. [`Vm::pause`] pauses the vCPUs that were
    /// [adopted](Vm::adopt_vcpu) by clones of this value.
    ///
    /// # Errors
    /// Returns the [`HvError`] of reading the default number of address bits, and
    /// [`AddressBits`](CreateVmError::AddressBits) for more than this Mac has.
    ///
    /// # Safety
    /// The process has a machine like this, and it is not destroyed while `owner` exists.
    ///
    /// # Examples
    /// ```no_run
    /// use hvf_backend::Vm;
    ///
    /// // The VMM has called `hv_vm_create(NULL)`.
    /// // SAFETY: the VMM destroys its machine at the end of the process.
    /// let vm = unsafe { Vm::options().adopt(()) }?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub unsafe fn adopt(&self, owner: impl Any + Send + Sync) -> Result<Vm, CreateVmError> {
        self.adopted(Arc::new(owner))
    }
}

/// A vCPU that the VMM has created itself, returned by [`Vm::adopt_vcpu`].
///
/// It has the methods of [`Vcpu`] that do not run the guest. The VMM runs it as before, passes each
/// exit to the tracker as an [`Exit`], and calls [`Vcpu::is_pausing`] before each run. Dropping the
/// value destroys nothing.
///
/// It is neither `Send` nor `Sync`.
#[derive(Debug)]
#[must_use = "a vCPU that is not adopted is not paused"]
pub struct AdoptedVcpu<'a> {
    vcpu: Vcpu,
    _owner: PhantomData<&'a ()>,
}

impl Vm {
    /// Adopts a vCPU that this thread has created by `hv_vcpu_create`.
    ///
    /// `creation_index` is the number of vCPUs that the machine had created before it. The
    /// interrupt controller has its redistributors in this order.
    ///
    /// The registers of the vCPU stay as they are. [`create_vcpu`](Self::create_vcpu) limits those
    /// that identify the CPU, and a VMM that restores snapshots on other Macs does so too.
    ///
    /// # Errors
    /// Returns [`AdoptVcpuError`] if the vCPU is not one of this thread, or is adopted already.
    ///
    /// # Safety
    /// The vCPU is one of this machine, and is not destroyed during `'a`.
    ///
    /// # Examples
    /// ```no_run
    /// use hvf_backend::{VcpuState, Vm};
    ///
    /// fn save(vm: &Vm, id: u64) -> Result<VcpuState, Box<dyn std::error::Error>> {
    ///     // SAFETY: the VMM destroys the vCPU of this thread later.
    ///     let vcpu = unsafe { vm.adopt_vcpu(id, 0) }?;
    ///     Ok(VcpuState::capture(&vcpu)?)
    /// }
    /// ```
    pub unsafe fn adopt_vcpu<'a>(
        &self,
        id: u64,
        creation_index: u32,
    ) -> Result<AdoptedVcpu<'a>, AdoptVcpuError> {
        let vcpu = Vcpu::adopt(self, id, creation_index).ok_or(AdoptVcpuError::Adopted { id })?;
        let adopted = AdoptedVcpu {
            vcpu,
            _owner: PhantomData,
        };
        match adopted.register(hv_reg_t::PC) {
            Ok(_) => Ok(adopted),
            Err(source) => Err(AdoptVcpuError::Refused { id, source }),
        }
    }
}

impl AdoptedVcpu<'_> {
    /// Waits while the vCPUs are paused, as [`Vcpu::park`] does.
    pub fn park(&mut self) {
        self.vcpu.park();
    }
}

impl Deref for AdoptedVcpu<'_> {
    type Target = Vcpu;

    fn deref(&self) -> &Vcpu {
        &self.vcpu
    }
}

/// Converts the exit of a vCPU that the VMM runs itself.
///
/// Reading the framework's structure as this type is undefined behavior for a reason of a later
/// macOS. [`Vcpu::run`] reads the number.
impl From<hv_vcpu_exit_t> for Exit {
    fn from(exit: hv_vcpu_exit_t) -> Self {
        use applevisor_sys::hv_exit_reason_t as Reason;
        let exception = exit.exception;
        match exit.reason {
            Reason::CANCELED => Self::Canceled,
            Reason::EXCEPTION => Self::Exception(Exception {
                syndrome: exception.syndrome,
                virtual_address: exception.virtual_address,
                physical_address: exception.physical_address,
            }),
            Reason::VTIMER_ACTIVATED => Self::VtimerActivated,
            other @ Reason::UNKNOWN => Self::Unknown(other as u32),
        }
    }
}

/// An error for adopting a vCPU. Nothing has changed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdoptVcpuError {
    /// The vCPU is adopted, and that value still exists.
    #[error("vCPU {id} is adopted already: use that value, or drop it first")]
    Adopted {
        /// The framework's number of the vCPU.
        id: u64,
    },
    /// The framework refused to read a register, as it does on another thread.
    #[error(
        "vCPU {id} is not a vCPU of this thread: adopt it on the thread that created it: {source}"
    )]
    Refused {
        /// The framework's number of the vCPU.
        id: u64,
        /// The error of the framework.
        #[source]
        source: HvError,
    },
}

#[cfg(feature = "applevisor")]
mod of_applevisor {
    use applevisor::vm::VirtualMachineInstance;

    use super::*;

    impl VmOptions {
        /// Adopts the machine of `applevisor`, which lives as long as the [`Vm`]. The options state
        /// what it is like, as in [`adopt`](Self::adopt): call [`gic`](Self::gic) for a
        /// `VirtualMachineInstance<GicEnabled>`.
        ///
        /// # Errors
        /// Returns the same errors as [`adopt`](Self::adopt).
        ///
        /// # Examples
        /// ```no_run
        /// use applevisor::vm::VirtualMachine;
        /// use hvf_backend::{VcpuState, Vm};
        ///
        /// let machine = VirtualMachine::new()?;
        /// let vcpu = machine.vcpu_create()?;
        ///
        /// let vm = Vm::options().adopt_applevisor(&machine)?;
        /// let adopted = vm.adopt_applevisor_vcpu(&vcpu, 0)?;
        /// vcpu.run()?;
        /// let state = VcpuState::capture(&adopted)?;
        /// # let _ = state;
        /// # Ok::<(), Box<dyn std::error::Error>>(())
        /// ```
        pub fn adopt_applevisor<G>(
            &self,
            machine: &VirtualMachineInstance<G>,
        ) -> Result<Vm, CreateVmError>
        where
            G: Clone + Send + Sync + 'static,
        {
            // The machine exists while a clone does.
            self.adopted(Arc::new(machine.clone()))
        }
    }

    impl Vm {
        /// Adopts a vCPU of `applevisor`, as [`adopt_vcpu`](Self::adopt_vcpu) does.
        ///
        /// # Errors
        /// Returns [`AdoptVcpuError`] if the vCPU is adopted already.
        pub fn adopt_applevisor_vcpu<'a>(
            &self,
            vcpu: &'a applevisor::vcpu::Vcpu,
            creation_index: u32,
        ) -> Result<AdoptedVcpu<'a>, AdoptVcpuError> {
            // SAFETY: a process has one machine. The vCPU is borrowed, so it is not destroyed
            // during `'a`. It is not Send, so this is its thread.
            unsafe { self.adopt_vcpu(vcpu.id(), creation_index) }
        }
    }
}
