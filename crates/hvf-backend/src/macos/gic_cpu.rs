//! The interrupt controller's registers of each CPU, and its physical timer.

#![allow(unsafe_code)]

use applevisor_sys::{hv_error_t, hv_gic_icc_reg_t as Icc, hv_sys_reg_t as R};

use super::errors::{CaptureError, HvError, RestoreError};
use super::newer;
use super::sys;
use super::vcpu::Vcpu;
use super::vm::Instance;
use crate::state::{Encoding, PhysicalTimer, SystemRegister, VcpuState};

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
    if !has_gic(vcpu) {
        return Ok(Vec::new());
    }
    let get = newer::hv_gic_get_icc_reg()?;
    let read = |register: Icc| {
        let mut value = 0;
        // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable.
        let code = unsafe { get(vcpu.id, register, &raw mut value) };
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

/// Reads the physical timer, which a vCPU has if the machine has an interrupt controller of the
/// framework.
pub(super) fn capture_timer(vcpu: &Vcpu) -> Result<Option<PhysicalTimer>, CaptureError> {
    if !has_gic(vcpu) {
        return Ok(None);
    }
    let control = match vcpu.system_register(R::CNTP_CTL_EL0) {
        // Some versions of the headers require exception level 2 for these registers.
        Err(error)
            if error.is(hv_error_t::HV_BAD_ARGUMENT) || error.is(hv_error_t::HV_UNSUPPORTED) =>
        {
            return Ok(None);
        }
        control => control.map_err(|source| CaptureError::Register {
            register: "CNTP_CTL_EL0".to_owned(),
            source,
        })?,
    };
    let compare = vcpu.system_register(R::CNTP_CVAL_EL0);
    let compare = compare.map_err(|source| CaptureError::Register {
        register: "CNTP_CVAL_EL0".to_owned(),
        source,
    })?;
    Ok(Some(PhysicalTimer::at(
        control,
        compare,
        sys::host_counter(),
    )))
}

/// Returns the number of the vCPU, if the machine has an interrupt controller of the framework.
pub(super) fn creation_index(vcpu: &Vcpu) -> Option<u32> {
    has_gic(vcpu).then_some(vcpu.creation_index)
}

/// Checks that the vCPU can have the state.
pub(super) fn check(vcpu: &Vcpu, state: &VcpuState) -> Result<(), RestoreError> {
    let captured = !state.gic_cpu.is_empty();
    if captured != has_gic(vcpu) {
        return Err(RestoreError::Gic { captured });
    }
    let found = vcpu.creation_index;
    match state.creation_index {
        Some(captured) if captured != found => Err(RestoreError::CreationOrder { captured, found }),
        // None: a state that was not captured.
        _ => Ok(()),
    }
}

pub(super) fn restore(vcpu: &Vcpu, state: &VcpuState) -> Result<(), RestoreError> {
    for saved in &state.gic_cpu {
        let known = |register: &Icc| *register as u16 == saved.register.0;
        let register = REGISTERS
            .into_iter()
            .find(known)
            .ok_or(RestoreError::UnknownRegister(saved.register))?;
        let set = newer::hv_gic_set_icc_reg()?;
        // SAFETY: the vCPU exists and belongs to this thread.
        let code = unsafe { set(vcpu.id, register, saved.value) };
        let set = HvError::check("hv_gic_set_icc_reg", code);
        set.map_err(|source| RestoreError::Register {
            register: name(register),
            source,
        })?;
    }
    let Some(timer) = state.physical_timer else {
        return Ok(());
    };
    // The compare value before the control register that enables the timer.
    for (register, value) in [
        (R::CNTP_CVAL_EL0, timer.compare(sys::host_counter())),
        (R::CNTP_CTL_EL0, timer.control),
    ] {
        let set = vcpu.set_system_register(register, value);
        set.map_err(|source| RestoreError::Register {
            register: format!("{register:?}"),
            source,
        })?;
    }
    Ok(())
}

fn has_gic(vcpu: &Vcpu) -> bool {
    matches!(vcpu.vm.instance, Instance::Gic(_))
}

fn name(register: Icc) -> String {
    format!("ICC_{register:?}")
}
