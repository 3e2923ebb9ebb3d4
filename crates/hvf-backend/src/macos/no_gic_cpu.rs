//! Without the feature `macos-15` no machine has an interrupt controller of the framework's.

use super::vcpu::Vcpu;
use super::vcpu_state::{CaptureError, RestoreError};
use crate::SystemRegister;

#[allow(clippy::unnecessary_wraps, reason = "as with an interrupt controller")]
pub(super) fn capture(_: &Vcpu) -> Result<Vec<SystemRegister>, CaptureError> {
    Ok(Vec::new())
}

pub(super) fn restore(_: &Vcpu, saved: &[SystemRegister]) -> Result<(), RestoreError> {
    match saved {
        [] => Ok(()),
        _ => Err(RestoreError::Gic { captured: true }),
    }
}
