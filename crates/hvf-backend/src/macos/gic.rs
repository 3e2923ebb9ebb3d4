//! The framework's interrupt controller: where it is, and its state.

use applevisor::gic::GicConfig;
use thiserror::Error;

use super::error::HvError;
use super::vm::{Instance, Vm};
use crate::GicState;

/// Where the guest finds its interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GicPlace {
    /// The guest-physical address of the distributor, 64 KiB.
    pub distributor: u64,
    /// The guest-physical address of the redistributors: one of 128 KiB for each vCPU that the framework can make.
    pub redistributors: u64,
}

impl GicPlace {
    pub(crate) fn config(self) -> Result<GicConfig, HvError> {
        let mut config = GicConfig::new();
        config
            .set_distributor_base(self.distributor)
            .map_err(HvError::of("hv_gic_config_set_distributor_base"))?;
        config
            .set_redistributor_base(self.redistributors)
            .map_err(HvError::of("hv_gic_config_set_redistributor_base"))?;
        Ok(config)
    }
}

impl Vm {
    /// Captures the interrupt controller, with every vCPU stopped. What each CPU has of it is in its [`VcpuState`](crate::VcpuState).
    ///
    /// # Errors
    /// [`GicError`].
    pub fn capture_gic(&self) -> Result<GicState, GicError> {
        let Instance::Gic(instance) = &self.instance else {
            return Err(GicError::NoGic);
        };
        let mut state = instance
            .gic_state_create()
            .map_err(HvError::of("hv_gic_state_create"))?;
        let size = state.size().map_err(HvError::of("hv_gic_state_get_size"))?;
        let mut data = vec![0; size];
        state
            .get(&mut data)
            .map_err(HvError::of("hv_gic_state_get_data"))?;
        Ok(GicState::new(data))
    }

    /// Gives the interrupt controller this state: once all vCPUs are made, before any has run, and before their own states.
    ///
    /// # Errors
    /// [`GicError`]. The machine is of no use then.
    pub fn restore_gic(&self, state: &GicState) -> Result<(), GicError> {
        let Instance::Gic(instance) = &self.instance else {
            return Err(GicError::NoGic);
        };
        // Only a state of this machine's own has the call that sets one.
        let own = instance
            .gic_state_create()
            .map_err(HvError::of("hv_gic_state_create"))?;
        own.set(state.data())
            .map_err(HvError::of("hv_gic_set_state"))?;
        Ok(())
    }
}

/// The state of the interrupt controller can't be captured or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GicError {
    /// The machine was made without one.
    #[error(
        "this virtual machine has no interrupt controller of the framework's: make it with `Vm::options().gic(..)`"
    )]
    NoGic,
    /// The framework does not take these bytes.
    #[error(
        "the interrupt controller does not take its state: the vCPUs must all be made and none may have run; and what one \
         version of macOS has captured, another may refuse"
    )]
    NotTaken(#[source] HvError),
    /// The framework gives no state.
    #[error("the interrupt controller can't be captured: every vCPU must be stopped")]
    Refused(#[source] HvError),
}

impl From<HvError> for GicError {
    fn from(error: HvError) -> Self {
        match error.call {
            "hv_gic_set_state" => Self::NotTaken(error),
            _ => Self::Refused(error),
        }
    }
}
