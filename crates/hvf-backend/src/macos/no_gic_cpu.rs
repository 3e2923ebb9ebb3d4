//! The replacement of `gic_cpu` without the feature `macos-15`, where no machine has an interrupt
//! controller of the framework.

#![allow(clippy::unnecessary_wraps, reason = "the signatures of `gic_cpu`")]

use super::errors::{CaptureError, RestoreError};
use super::vcpu::Vcpu;
use crate::state::{PhysicalTimer, SystemRegister, VcpuState};

pub(super) fn capture(_: &Vcpu) -> Result<Vec<SystemRegister>, CaptureError> {
    Ok(Vec::new())
}

pub(super) fn capture_timer(_: &Vcpu) -> Result<Option<PhysicalTimer>, CaptureError> {
    Ok(None)
}

pub(super) fn creation_index(_: &Vcpu) -> Option<u32> {
    None
}

pub(super) fn check(_: &Vcpu, state: &VcpuState) -> Result<(), RestoreError> {
    match state.gic_cpu[..] {
        [] => Ok(()),
        _ => Err(RestoreError::Gic { captured: true }),
    }
}

pub(super) fn restore(_: &Vcpu, _: &VcpuState) -> Result<(), RestoreError> {
    Ok(())
}
