//! The addresses of the framework's interrupt controller.

use applevisor::gic::GicConfig;

use super::errors::HvError;

/// The guest-physical addresses of the interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GicPlace {
    /// The address of the distributor, which takes 64 KiB.
    pub distributor: u64,
    /// The address of the redistributors. There is one of 128 KiB for each vCPU that the framework
    /// can create.
    pub redistributors: u64,
}

impl GicPlace {
    pub(crate) fn config(self) -> Result<GicConfig, HvError> {
        let mut config = GicConfig::new();
        config
            .set_distributor_base(self.distributor)
            .map_err(HvError::in_call("hv_gic_config_set_distributor_base"))?;
        config
            .set_redistributor_base(self.redistributors)
            .map_err(HvError::in_call("hv_gic_config_set_redistributor_base"))?;
        Ok(config)
    }
}
