//! What replaces the settings of features that are not selected.

#[cfg(not(feature = "macos-15"))]
use std::sync::Arc;

#[cfg(not(feature = "macos-15"))]
use super::create_error::CreateVmError;
#[cfg(not(feature = "macos-15"))]
use super::machine::{Instance, Machine};
use super::vm::{PAGE_SIZE, VmOptions};

impl VmOptions {
    #[cfg(not(feature = "macos-13"))]
    pub(super) fn requested_bits(&self) -> Option<u32> {
        None
    }

    pub(super) fn granule(&self) -> u64 {
        PAGE_SIZE
    }

    #[cfg(not(feature = "macos-15"))]
    #[allow(clippy::unnecessary_wraps, reason = "the signature with the feature")]
    pub(super) fn instance(&self, machine: Arc<Machine>) -> Result<Instance, CreateVmError> {
        Ok(Instance::Plain(machine))
    }
}
