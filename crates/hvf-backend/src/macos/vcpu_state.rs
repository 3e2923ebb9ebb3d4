//! Reading a vCPU's state out, and putting it back.

#![allow(unsafe_code)]

use applevisor_sys::{
    hv_interrupt_type_t, hv_reg_t, hv_simd_fp_reg_t, hv_sys_reg_t, hv_vcpu_get_pending_interrupt,
    hv_vcpu_get_simd_fp_reg, hv_vcpu_get_trap_debug_exceptions,
    hv_vcpu_get_trap_debug_reg_accesses, hv_vcpu_get_vtimer_mask, hv_vcpu_get_vtimer_offset,
    hv_vcpu_set_pending_interrupt, hv_vcpu_set_trap_debug_exceptions,
    hv_vcpu_set_trap_debug_reg_accesses, hv_vcpu_set_vtimer_mask, hv_vcpu_set_vtimer_offset,
};
use thiserror::Error;

use super::error::HvError;
use super::vcpu::Vcpu;
use super::{gic_cpu, registers, sys};
use crate::{Encoding, SystemRegister, VcpuState, VirtualTimer};

/// CPACR_EL1.SMEN, its lower bit: the guest has switched on the scalable matrix extension (Arm ARM, CPACR_EL1).
const SME_ON: u64 = 1 << 24;

/// What a restored vCPU has that the captured one had not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a register that differs may be one that the guest relies on"]
#[non_exhaustive]
pub struct Restored {
    /// System registers that read otherwise than they were captured, with the captured values: the framework took and ignored them. Those that say what
    /// the CPU is (`ID_*`, MIDR_EL1) are among them where the guest was captured on another kind of Mac.
    pub differing: Vec<SystemRegister>,
}

impl VirtualTimer {
    /// The offset with which the virtual counter goes on from where it was captured: the time in between did not happen.
    ///
    /// The vCPUs of one guest need one offset, or their clocks differ: ask for it once.
    #[must_use]
    pub fn resuming_offset(&self) -> u64 {
        sys::host_counter().wrapping_sub(self.counter)
    }
}

impl VcpuState {
    /// Captures the state of `vcpu`, on its thread. For an image of one moment, all other vCPUs of the machine are stopped too.
    ///
    /// # Errors
    /// [`CaptureError`] names the register that the framework did not give, or state that this crate does not know how to capture.
    pub fn capture(vcpu: &Vcpu) -> Result<Self, CaptureError> {
        let cpacr = vcpu.system_register(hv_sys_reg_t::CPACR_EL1)?;
        if cpacr & SME_ON != 0 {
            return Err(CaptureError::Sme);
        }
        let mut state = Self::default();
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
        for register in registers::of(vcpu)? {
            let value = vcpu.system_register(register);
            state.system.push(SystemRegister {
                register: Encoding(register as u16),
                value: value.map_err(|source| CaptureError::Register {
                    register: format!("{register:?}"),
                    source,
                })?,
            });
        }
        state.gic_cpu = gic_cpu::capture(vcpu)?;
        let offset = get(vcpu, "hv_vcpu_get_vtimer_offset", hv_vcpu_get_vtimer_offset)?;
        state.vtimer = VirtualTimer {
            counter: sys::host_counter().wrapping_sub(offset),
            masked: get(vcpu, "hv_vcpu_get_vtimer_mask", hv_vcpu_get_vtimer_mask)?,
        };
        state.pending_irq = pending(vcpu, hv_interrupt_type_t::IRQ)?;
        state.pending_fiq = pending(vcpu, hv_interrupt_type_t::FIQ)?;
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

    /// Gives this state to `vcpu`, on its thread, with this offset of the virtual counter from the host's:
    /// [`resuming_offset`](VirtualTimer::resuming_offset) of any vCPU of the guest, and the same for all.
    ///
    /// What was written is read back. A general or a vector register that differs is an error, a system register is [told](Restored::differing).
    ///
    /// # Errors
    /// [`RestoreError`] names the register. The vCPU is of no use then: restore into a new one.
    pub fn restore(&self, vcpu: &Vcpu, vtimer_offset: u64) -> Result<Restored, RestoreError> {
        set(
            vcpu,
            "hv_vcpu_set_vtimer_offset",
            hv_vcpu_set_vtimer_offset,
            vtimer_offset,
        )?;
        let differing = self.restore_system(vcpu)?;
        gic_cpu::restore(vcpu, &self.gic_cpu)?;
        let others = [
            (hv_reg_t::PC, self.pc),
            (hv_reg_t::CPSR, self.cpsr),
            (hv_reg_t::FPCR, self.fpcr),
            (hv_reg_t::FPSR, self.fpsr),
        ];
        for (register, value) in registers::GENERAL.into_iter().zip(self.x).chain(others) {
            vcpu.set_register(register, value)?;
            let found = vcpu.register(register)?;
            read_back(|| format!("{register:?}"), value.into(), found.into())?;
        }
        for (register, value) in registers::SIMD.into_iter().zip(self.q) {
            // SAFETY: the vCPU exists and is of this thread.
            let code = unsafe { sys::set_simd_fp_reg(vcpu.id, register, value) };
            HvError::check("hv_vcpu_set_simd_fp_reg", code)?;
            read_back(|| format!("{register:?}"), value, simd(vcpu, register)?)?;
        }
        for (interrupt, pending) in [
            (hv_interrupt_type_t::IRQ, self.pending_irq),
            (hv_interrupt_type_t::FIQ, self.pending_fiq),
        ] {
            // SAFETY: the vCPU exists and is of this thread.
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

    /// Writes the system registers that differ, and says which still do.
    fn restore_system(&self, vcpu: &Vcpu) -> Result<Vec<SystemRegister>, RestoreError> {
        let mut differing = Vec::new();
        for saved in &self.system {
            let register = registers::by_encoding(saved.register.0)
                .ok_or(RestoreError::UnknownRegister(saved.register))?;
            let refused = |source| RestoreError::Register {
                register: format!("{register:?}"),
                source,
            };
            let differs = |found: u64| {
                let compared = !registers::read_only_bits(register);
                found & compared != saved.value & compared
            };
            if !differs(vcpu.system_register(register).map_err(refused)?) {
                continue;
            }
            let set = vcpu.set_system_register(register, saved.value);
            // What says what the CPU is can't be written everywhere. That it differs is told all the same.
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
    // SAFETY: the vCPU exists and is of this thread; the address is of 16 bytes, aligned to 16.
    let code = unsafe { hv_vcpu_get_simd_fp_reg(vcpu.id, register, &raw mut value) };
    HvError::check("hv_vcpu_get_simd_fp_reg", code).map(|()| value)
}

fn pending(vcpu: &Vcpu, interrupt: hv_interrupt_type_t) -> Result<bool, HvError> {
    let mut pending = false;
    // SAFETY: the vCPU exists and is of this thread; the framework writes 0 or 1 to the address of a variable.
    let code = unsafe { hv_vcpu_get_pending_interrupt(vcpu.id, interrupt, &raw mut pending) };
    HvError::check("hv_vcpu_get_pending_interrupt", code).map(|()| pending)
}

/// Calls one of the framework's functions that write one value.
fn get<T: Default>(
    vcpu: &Vcpu,
    call: &'static str,
    function: unsafe extern "C" fn(u64, *mut T) -> i32,
) -> Result<T, HvError> {
    let mut value = T::default();
    // SAFETY: the vCPU exists and is of this thread; the address is of a variable of the type that the function writes.
    HvError::check(call, unsafe { function(vcpu.id, &raw mut value) }).map(|()| value)
}

/// Calls one of the framework's functions that take one value.
fn set<T>(
    vcpu: &Vcpu,
    call: &'static str,
    function: unsafe extern "C" fn(u64, T) -> i32,
    value: T,
) -> Result<(), HvError> {
    // SAFETY: the vCPU exists and is of this thread.
    HvError::check(call, unsafe { function(vcpu.id, value) })
}

fn read_back(
    register: impl Fn() -> String,
    written: u128,
    found: u128,
) -> Result<(), RestoreError> {
    if written == found {
        return Ok(());
    }
    Err(RestoreError::NotTaken {
        register: register(),
        written,
        found,
    })
}

/// A vCPU's state can't be captured: nothing of it is given, rather than a part.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The framework does not give a register that this crate takes every vCPU to have.
    #[error("the framework does not give {register}: the guest could not go on without it")]
    Register {
        /// Its name.
        register: String,
        /// What the framework said.
        #[source]
        source: HvError,
    },
    /// The guest uses the scalable matrix extension.
    #[error(
        "the guest has switched on SME (CPACR_EL1.SMEN), whose registers are not captured: hide it in ID_AA64PFR1_EL1 before the guest starts"
    )]
    Sme,
    /// The framework refused.
    #[error("a vCPU's state can't be captured")]
    Refused(#[from] HvError),
}

/// A vCPU's state can't be restored, or not whole. The vCPU is of no use.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The state has a register that this version does not know.
    #[error(
        "the state has the register {0}, which this build does not know: a newer one captured it, or one with the feature `macos-15`"
    )]
    UnknownRegister(Encoding),
    /// The framework refused a register, or its value.
    #[error("the framework does not take {register} as it was captured")]
    Register {
        /// Its name.
        register: String,
        /// What the framework said.
        #[source]
        source: HvError,
    },
    /// A register reads otherwise than it was written.
    #[error("{register} was set to {written:#x}, and is {found:#x}")]
    NotTaken {
        /// Its name.
        register: String,
        /// What was written.
        written: u128,
        /// What was read back.
        found: u128,
    },
    /// The state has registers of an interrupt controller, and the machine has none; or the other way round.
    #[error(
        "the state was captured {} the framework's interrupt controller, and this machine was made {} it (`Vm::options().gic(..)`)",
        if *.captured { "with" } else { "without" }, if *.captured { "without" } else { "with" }
    )]
    Gic {
        /// Whether the captured machine had one.
        captured: bool,
    },
    /// The framework refused.
    #[error("a vCPU's state can't be restored")]
    Refused(#[from] HvError),
}
