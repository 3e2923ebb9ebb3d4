//! The interrupt controller's registers of each CPU.

#![allow(unsafe_code)]

use applevisor_sys::{hv_gic_get_icc_reg, hv_gic_icc_reg_t as Icc, hv_gic_set_icc_reg};

use super::errors::{CaptureError, HvError, RestoreError};
use super::vcpu::Vcpu;
use super::vm::Instance;
use crate::state::{Encoding, SystemRegister};

/// The registers in the order in which they are written: SRE and CTLR first, which enable the
/// interface, and the interrupt groups last.
///
/// RPR_EL1 is not included, because it is read-only and follows from the active priorities.
const REGISTERS: [Icc; 9] = [
    Icc::SRE_EL1,
    Icc::CTLR_EL1,
    Icc::PMR_EL1,
    Icc::BPR0_EL1,
    Icc::BPR1_EL1,
    Icc::AP0R0_EL1,
    Icc::AP1R0_EL1,
    Icc::IGRPEN0_EL1,
    Icc::IGRPEN1_EL1,
];

/// Reads the registers. Returns none if the machine has no interrupt controller of the framework.
pub(super) fn capture(vcpu: &Vcpu) -> Result<Vec<SystemRegister>, CaptureError> {
    if matches!(vcpu.vm.instance, Instance::Plain(_)) {
        return Ok(Vec::new());
    }
    let read = |register: Icc| {
        let mut value = 0;
        // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable.
        let code = unsafe { hv_gic_get_icc_reg(vcpu.id, register, &raw mut value) };
        let read = HvError::check("hv_gic_get_icc_reg", code);
        read.map_err(|source| CaptureError::Register {
            register: name(register),
            source,
        })?;
        Ok(SystemRegister {
            register: Encoding(register as u16),
            value,
        })
    };
    REGISTERS.into_iter().map(read).collect()
}

pub(super) fn restore(vcpu: &Vcpu, saved: &[SystemRegister]) -> Result<(), RestoreError> {
    let captured = !saved.is_empty();
    if captured != matches!(vcpu.vm.instance, Instance::Gic(_)) {
        return Err(RestoreError::Gic { captured });
    }
    for saved in saved {
        let known = |register: &Icc| *register as u16 == saved.register.0;
        let register = REGISTERS
            .into_iter()
            .find(known)
            .ok_or(RestoreError::UnknownRegister(saved.register))?;
        // SAFETY: the vCPU exists and belongs to this thread.
        let code = unsafe { hv_gic_set_icc_reg(vcpu.id, register, saved.value) };
        let set = HvError::check("hv_gic_set_icc_reg", code);
        set.map_err(|source| RestoreError::Register {
            register: name(register),
            source,
        })?;
    }
    Ok(())
}

fn name(register: Icc) -> String {
    format!("ICC_{register:?}")
}
