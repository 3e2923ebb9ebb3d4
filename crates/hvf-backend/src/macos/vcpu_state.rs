//! Capture and restore of a vCPU's state.

#![allow(unsafe_code)]

use std::fmt;

use applevisor_sys::{
    hv_interrupt_type_t, hv_reg_t, hv_simd_fp_reg_t, hv_vcpu_get_pending_interrupt,
    hv_vcpu_get_simd_fp_reg, hv_vcpu_get_trap_debug_exceptions,
    hv_vcpu_get_trap_debug_reg_accesses, hv_vcpu_get_vtimer_mask, hv_vcpu_get_vtimer_offset,
    hv_vcpu_set_pending_interrupt, hv_vcpu_set_trap_debug_exceptions,
    hv_vcpu_set_trap_debug_reg_accesses, hv_vcpu_set_vtimer_mask, hv_vcpu_set_vtimer_offset,
};

use super::errors::{CaptureError, HvError, RestoreError};
use super::numbers::{FIQ, IRQ};
use super::vcpu::Vcpu;
use super::{gic_cpu, registers, sme, sys, vcpu_features};
use crate::state::{Encoding, SystemRegister, VcpuState, VirtualTimer};

/// The differences of a restored vCPU from the captured one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a register that differs may be one that the guest relies on"]
#[non_exhaustive]
pub struct Restored {
    /// The system registers whose values differ from the captured ones, with the captured values.
    ///
    /// The framework accepted these values and ignored them. If the guest was captured on another
    /// kind of Mac, this includes MIDR_EL1, and registers of features that could not be hidden
    /// (`ID_*`).
    pub differing: Vec<SystemRegister>,
}

impl VirtualTimer {
    /// Returns the offset with which the virtual counter continues from its captured value, as if
    /// no time had passed.
    ///
    /// All vCPUs of a guest need the same offset, otherwise their clocks differ. Call this once for
    /// each guest.
    #[must_use]
    pub fn resuming_offset(&self) -> u64 {
        sys::host_counter().wrapping_sub(self.counter)
    }
}

impl VcpuState {
    /// Captures the state of `vcpu`, on its thread.
    ///
    /// For a point-in-time image, all other vCPUs of the machine must be stopped too.
    ///
    /// # Errors
    /// Returns [`CaptureError`], which names the register that could not be read, or the state that
    /// this crate can't capture.
    pub fn capture(vcpu: &Vcpu) -> Result<Self, CaptureError> {
        let mut state = Self {
            sme: sme::capture(vcpu)?,
            ..Self::default()
        };
        for (value, register) in state.x.iter_mut().zip(registers::GENERAL) {
            *value = vcpu.register(register)?;
        }
        state.pc = vcpu.register(hv_reg_t::PC)?;
        state.cpsr = vcpu.register(hv_reg_t::CPSR)?;
        state.fpcr = vcpu.register(hv_reg_t::FPCR)?;
        state.fpsr = vcpu.register(hv_reg_t::FPSR)?;
        for (value, register) in state.q.iter_mut().zip(registers::SIMD) {
            *value = simd(vcpu, register)?;
        }
        for register in registers::system(vcpu)? {
            let value = vcpu.system_register(register);
            if registers::is_missing(register, &value) {
                continue;
            }
            state.system.push(SystemRegister {
                register: Encoding(register as u16),
                value: value.map_err(|source| CaptureError::Register {
                    register: format!("{register:?}"),
                    source,
                })?,
            });
        }
        state.gic_cpu = gic_cpu::capture(vcpu)?;
        state.physical_timer = gic_cpu::capture_timer(vcpu)?;
        state.creation_index = gic_cpu::creation_index(vcpu);
        let offset = get(vcpu, "hv_vcpu_get_vtimer_offset", hv_vcpu_get_vtimer_offset)?;
        state.vtimer = VirtualTimer {
            counter: sys::host_counter().wrapping_sub(offset),
            masked: get(vcpu, "hv_vcpu_get_vtimer_mask", hv_vcpu_get_vtimer_mask)?,
        };
        state.pending_irq = pending(vcpu, IRQ)?;
        state.pending_fiq = pending(vcpu, FIQ)?;
        state.trap_debug_exceptions = get(
            vcpu,
            "hv_vcpu_get_trap_debug_exceptions",
            hv_vcpu_get_trap_debug_exceptions,
        )?;
        state.trap_debug_reg_accesses = get(
            vcpu,
            "hv_vcpu_get_trap_debug_reg_accesses",
            hv_vcpu_get_trap_debug_reg_accesses,
        )?;
        Ok(state)
    }

    /// Restores this state into `vcpu`, on its thread.
    ///
    /// `vtimer_offset` is the offset of the virtual counter from the host's counter. Pass the
    /// [`resuming_offset`](VirtualTimer::resuming_offset) of one vCPU to all vCPUs of the guest.
    ///
    /// The CPU must have the [features](crate::CpuFeatures) that the guest was promised. Those that
    /// it has in addition are hidden.
    ///
    /// Every written register is read back. A difference is an error for a general or vector
    /// register, and is [reported](Restored::differing) for a system register.
    ///
    /// # Errors
    /// Returns [`RestoreError`], which names the register. The vCPU is then unusable: restore into
    /// a new one.
    pub fn restore(&self, vcpu: &Vcpu, vtimer_offset: u64) -> Result<Restored, RestoreError> {
        if let Some(unknown) = self.unknown.first() {
            return Err(RestoreError::UnknownName(unknown.name.clone()));
        }
        gic_cpu::check(vcpu, self)?;
        vcpu_features::check(vcpu, self)?;
        set(
            vcpu,
            "hv_vcpu_set_vtimer_offset",
            hv_vcpu_set_vtimer_offset,
            vtimer_offset,
        )?;
        let differing = self.restore_system(vcpu)?;
        gic_cpu::restore(vcpu, self)?;
        // The order of `Hypervisor/hv_vcpu.h`: the modes reset the vector registers and FPSR.
        if let Some(sme) = &self.sme {
            sme::restore_modes(vcpu, sme)?;
        }
        for (register, value) in registers::SIMD.into_iter().zip(self.q) {
            // SAFETY: the vCPU exists and belongs to this thread.
            let code = unsafe { sys::set_simd_fp_reg(vcpu.id, register, value) };
            HvError::check("hv_vcpu_set_simd_fp_reg", code)?;
            let found = simd(vcpu, register)?;
            if found != value {
                return Err(not_taken(register, value, found));
            }
        }
        if let Some(sme) = &self.sme {
            sme::restore_registers(vcpu, sme)?;
        }
        let others = [
            (hv_reg_t::PC, self.pc),
            (hv_reg_t::CPSR, self.cpsr),
            (hv_reg_t::FPCR, self.fpcr),
            (hv_reg_t::FPSR, self.fpsr),
        ];
        for (register, value) in registers::GENERAL.into_iter().zip(self.x).chain(others) {
            vcpu.set_register(register, value)?;
            let found = vcpu.register(register)?;
            let kept = registers::kept_bits(register);
            if (found ^ value) & kept != 0 {
                return Err(not_taken(register, value.into(), found.into()));
            }
        }
        for (interrupt, pending) in [(IRQ, self.pending_irq), (FIQ, self.pending_fiq)] {
            // SAFETY: the vCPU exists and belongs to this thread.
            let code = unsafe { hv_vcpu_set_pending_interrupt(vcpu.id, interrupt, pending) };
            HvError::check("hv_vcpu_set_pending_interrupt", code)?;
        }
        set(
            vcpu,
            "hv_vcpu_set_trap_debug_exceptions",
            hv_vcpu_set_trap_debug_exceptions,
            self.trap_debug_exceptions,
        )?;
        set(
            vcpu,
            "hv_vcpu_set_trap_debug_reg_accesses",
            hv_vcpu_set_trap_debug_reg_accesses,
            self.trap_debug_reg_accesses,
        )?;
        set(
            vcpu,
            "hv_vcpu_set_vtimer_mask",
            hv_vcpu_set_vtimer_mask,
            self.vtimer.masked,
        )?;
        Ok(Restored { differing })
    }

    /// Writes the system registers that differ. Returns those that still differ.
    fn restore_system(&self, vcpu: &Vcpu) -> Result<Vec<SystemRegister>, RestoreError> {
        let mut differing = Vec::new();
        for saved in &self.system {
            let register = registers::by_encoding(saved.register.0)
                .ok_or(RestoreError::UnknownRegister(saved.register))?;
            let refused = |source| RestoreError::Register {
                register: format!("{register:?}"),
                source,
            };
            // A register that this system or CPU does not have, and that was not in use.
            let found = vcpu.system_register(register);
            if registers::is_missing(register, &found) && saved.value == 0 {
                continue;
            }
            let differs = |found: u64| {
                let compared = !registers::read_only_bits(register);
                found & compared != saved.value & compared
            };
            if !differs(found.map_err(refused)?) {
                continue;
            }
            let set = vcpu.set_system_register(register, saved.value);
            // Some identification registers can't be written. Their differences are reported
            // nevertheless.
            if !registers::is_identification(register) {
                set.map_err(refused)?;
            }
            if differs(vcpu.system_register(register).map_err(refused)?) {
                differing.push(*saved);
            }
        }
        Ok(differing)
    }
}

/// Reads a vector register.
fn simd(vcpu: &Vcpu, register: hv_simd_fp_reg_t) -> Result<u128, HvError> {
    let mut value = 0_u128;
    // SAFETY: the vCPU exists and belongs to this thread. The address is of 16 bytes, aligned to
    // 16.
    let code = unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, register, &raw mut value) };
    HvError::check("hv_vcpu_get_simd_fp_reg", code).map(|()| value)
}

fn pending(vcpu: &Vcpu, interrupt: hv_interrupt_type_t) -> Result<bool, HvError> {
    let mut pending = false;
    // SAFETY: the vCPU exists and belongs to this thread. The framework writes 0 or 1 to the
    // address of a variable.
    let code = unsafe { hv_vcpu_get_pending_interrupt(vcpu.id, interrupt, &raw mut pending) };
    HvError::check("hv_vcpu_get_pending_interrupt", code).map(|()| pending)
}

/// Calls a function of the framework that writes one value.
fn get<T: Default>(
    vcpu: &Vcpu,
    call: &'static str,
    function: unsafe extern "C" fn(u64, *mut T) -> i32,
) -> Result<T, HvError> {
    let mut value = T::default();
    // SAFETY: the vCPU exists and belongs to this thread. The address is of a variable of the type
    // that the function writes.
    HvError::check(call, unsafe { function(vcpu.id, &raw mut value) }).map(|()| value)
}

/// Calls a function of the framework that takes one value.
fn set<T>(
    vcpu: &Vcpu,
    call: &'static str,
    function: unsafe extern "C" fn(u64, T) -> i32,
    value: T,
) -> Result<(), HvError> {
    // SAFETY: the vCPU exists and belongs to this thread.
    HvError::check(call, unsafe { function(vcpu.id, value) })
}

/// Returns the error for a register that reads another value than was written.
fn not_taken(register: impl fmt::Debug, written: u128, found: u128) -> RestoreError {
    RestoreError::NotTaken {
        register: format!("{register:?}"),
        written,
        found,
    }
}
