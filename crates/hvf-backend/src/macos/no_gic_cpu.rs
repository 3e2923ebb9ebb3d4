//! The replacement of `gic_cpu` without the feature `macos-15`, where no machine has an interrupt
//! controller of the framework.

use super::errors::{CaptureError, RestoreError};
use super::vcpu::Vcpu;
use crate::state::SystemRegister;

#[allow(clippy::unnecessary_wraps, reason = "the signature of `gic_cpu`")]
pub(super) fn capture(_: &Vcpu) -> Result<Vec<SystemRegister>, CaptureError> {
    Ok(Vec::new())
}

pub(super) fn restore(_: &Vcpu, saved: &[SystemRegister]) -> Result<(), RestoreError> {
    match saved {
        [] => Ok(()),
        _ => Err(RestoreError::Gic { captured: true }),
    }
}
