//! The sizes and the state of the framework's interrupt controller.

#![allow(unsafe_code)]

use thiserror::Error;

use super::errors::HvError;
use super::gic_place::{GicSizes, GicSizesError};
use super::machine::Object;
use super::newer;
use super::vm::Vm;
use crate::state::GicState;

impl Vm {
    /// Returns the sizes and alignments with which a [`GicPlace`](crate::GicPlace) is chosen. No
    /// machine needs to exist.
    ///
    /// # Errors
    /// Returns [`GicSizesError`] if this macOS has no interrupt controller or the framework
    /// refuses.
    pub fn gic_sizes() -> Result<GicSizes, GicSizesError> {
        GicSizes::read()
    }

    /// Captures the state of the interrupt controller. Every vCPU must be stopped.
    ///
    /// The controller's registers of each CPU are in its [`VcpuState`](crate::VcpuState).
    ///
    /// # Errors
    /// Returns [`GicError`] if the machine has no interrupt controller or the framework refuses.
    pub fn capture_gic(&self) -> Result<GicState, GicError> {
        self.check_gic()?;
        let create = newer::hv_gic_state_create().map_err(HvError::missing)?;
        // SAFETY: the machine exists, and the function returns a new object.
        let state = unsafe { Object::create("hv_gic_state_create", create) }?;
        let get = newer::hv_gic_state_get_size().map_err(HvError::missing)?;
        let mut size = 0;
        // SAFETY: the object exists, and the address is of a variable.
        let code = unsafe { get(state.as_ptr(), &raw mut size) };
        HvError::check("hv_gic_state_get_size", code)?;
        let mut data = vec![0; size];
        let get = newer::hv_gic_state_get_data().map_err(HvError::missing)?;
        // SAFETY: the object exists, and the buffer has the size of its state.
        let code = unsafe { get(state.as_ptr(), data.as_mut_ptr().cast()) };
        HvError::check("hv_gic_state_get_data", code)?;
        Ok(GicState::new(data))
    }

    /// Restores the state of the interrupt controller.
    ///
    /// [`restore_vcpus`](Vm::restore_vcpus) calls this at the right time. Otherwise, call it after
    /// all vCPUs are created in the order of
    /// [`creation_index`](crate::VcpuState::creation_index) and have their captured MPIDR_EL1,
    /// before any has run, and before their own states are restored. The framework assigns the
    /// redistributors in the order of creation, and interrupts by the affinity in MPIDR_EL1.
    ///
    /// # Errors
    /// Returns [`GicError`]. The machine is then unusable.
    pub fn restore_gic(&self, state: &GicState) -> Result<(), GicError> {
        self.check_gic()?;
        let (set, data) = (
            newer::hv_gic_set_state().map_err(HvError::missing)?,
            state.data(),
        );
        // SAFETY: the address and the size are those of the slice.
        let code = unsafe { set(data.as_ptr().cast(), data.len()) };
        HvError::check("hv_gic_set_state", code)?;
        Ok(())
    }
}

/// An error for capturing or restoring the interrupt controller.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GicError {
    /// The machine was created without an interrupt controller of the framework.
    #[error(
        "this virtual machine has no interrupt controller of the framework: create it with \
         `Vm::options().gic(..)`"
    )]
    NoGic,
    /// The framework refused the state.
    #[error(
        "failed to restore the interrupt controller: create all vCPUs first, run none before, and \
         use the version of macOS that captured the state: {0}"
    )]
    NotTaken(#[source] HvError),
    /// The framework refused an interrupt.
    #[error(
        "failed to signal an interrupt: use a number of `Vm::gic_sizes().spis`, for a line one \
         outside the region for messages (`VmOptions::gic_msis`), for a message one inside: {0}"
    )]
    Interrupt(#[source] HvError),
    /// The framework refused to reset the interrupt controller.
    #[error("failed to reset the interrupt controller: stop every vCPU first: {0}")]
    Reset(#[source] HvError),
    /// Another call of the framework failed.
    #[error("failed to read the state of the interrupt controller: stop every vCPU first: {0}")]
    Refused(#[source] HvError),
}

impl From<HvError> for GicError {
    fn from(error: HvError) -> Self {
        match error.call {
            "hv_gic_set_state" => Self::NotTaken(error),
            "hv_gic_set_spi" | "hv_gic_send_msi" => Self::Interrupt(error),
            "hv_gic_reset" => Self::Reset(error),
            _ => Self::Refused(error),
        }
    }
}
