//! The framework's functions for the registers, interrupts and the timer of a vCPU.

use std::arch::x86_64::__m128i;

use crate::calls::{Code, Outcome, framework, give};
use crate::registers::{general, set_pstate, unexpected};
use crate::unicorn::register;
use crate::vcpu;

/// The numbers of `hv_reg_t` after X0 to X30.
const PC: u32 = 31;
const FPCR: u32 = 32;
const FPSR: u32 = 33;
const CPSR: u32 = 34;

/// The bits of PSTATE that a CPU without memory tagging keeps (Arm ARM, C5.2): not TCO, and no bit
/// that is RES0.
const KEPT: u64 = 0xf1f0_1fdf;

/// Returns Unicorn's number of a register of `hv_reg_t`.
fn numbered(number: u32) -> Result<i32, Code> {
    match number {
        PC => Ok(register::PC),
        FPCR => Ok(register::FPCR),
        FPSR => Ok(register::FPSR),
        CPSR => Ok(register::PSTATE),
        number => general(number).ok_or(Code::BAD_ARGUMENT),
    }
}

fn vector(number: u32) -> Result<i32, Code> {
    match number {
        0..=31 => Ok(register::Q0 + number.cast_signed()),
        _ => Err(Code::BAD_ARGUMENT),
    }
}

fn set_register(id: u64, number: u32, value: u64) -> Outcome {
    let to = numbered(number)?;
    vcpu::own(id, |vcpu| {
        let engine = &vcpu.emulation.engine;
        let set = match number {
            CPSR => set_pstate(engine, value & KEPT),
            _ => engine.write(to, value),
        };
        set.map_err(unexpected)
    })
}

framework! {
    fn hv_vcpu_get_reg(id: u64, number: u32, value: *mut u64) {
        let from = numbered(number)?;
        vcpu::own(id, |vcpu| give(value, vcpu.emulation.engine.read(from).map_err(unexpected)?))
    }

    fn hv_vcpu_set_reg(id: u64, number: u32, value: u64) {
        set_register(id, number, value)
    }

    fn hv_vcpu_get_simd_fp_reg(id: u64, number: u32, value: *mut u128) {
        let from = vector(number)?;
        vcpu::own(id, |vcpu| {
            if let Some(bytes) = vcpu.sme.q(number) {
                return give(value, u128::from_le_bytes(*bytes));
            }
            let read: [u64; 2] = vcpu.emulation.engine.read(from).map_err(unexpected)?;
            give(value, u128::from(read[1]) << 64 | u128::from(read[0]))
        })
    }

    /// The value is a vector, which is passed in a vector register.
    #[allow(improper_ctypes_definitions, reason = "rustc passes short vectors as the ABI defines")]
    fn hv_vcpu_set_simd_fp_reg(id: u64, number: u32, value: __m128i) {
        let to = vector(number)?;
        vcpu::own(id, |vcpu| {
            if let Some(bytes) = vcpu.sme.q(number) {
                // SAFETY: both types have 16 bytes, of which all values are valid.
                *bytes = unsafe { std::mem::transmute::<__m128i, [u8; 16]>(value) };
                return Ok(());
            }
            vcpu.emulation.engine.write(to, value).map_err(unexpected)
        })
    }

    fn hv_vcpu_get_sys_reg(id: u64, register: u16, value: *mut u64) {
        vcpu::own(id, |vcpu| {
            let (engine, state) = vcpu.emulation.parts();
            give(value, state.read(engine, register)?)
        })
    }

    fn hv_vcpu_set_sys_reg(id: u64, register: u16, value: u64) {
        vcpu::own(id, |vcpu| {
            let (engine, state) = vcpu.emulation.parts();
            state.write(engine, register, value)
        })
    }

    fn hv_vcpu_get_pending_interrupt(id: u64, kind: u32, pending: *mut bool) {
        vcpu::own(id, |vcpu| give(pending, *vcpu.emulation.state().lines.line(kind)?))
    }

    fn hv_vcpu_set_pending_interrupt(id: u64, kind: u32, pending: bool) {
        vcpu::own(id, |vcpu| {
            *vcpu.emulation.state().lines.line(kind)? = pending;
            Ok(())
        })
    }

    fn hv_vcpu_get_vtimer_mask(id: u64, masked: *mut bool) {
        vcpu::own(id, |vcpu| give(masked, vcpu.emulation.state().timer.masked))
    }

    fn hv_vcpu_set_vtimer_mask(id: u64, masked: bool) {
        vcpu::own(id, |vcpu| {
            vcpu.emulation.state().timer.masked = masked;
            Ok(())
        })
    }

    fn hv_vcpu_get_vtimer_offset(id: u64, offset: *mut u64) {
        vcpu::own(id, |vcpu| give(offset, vcpu.emulation.state().timer.offset))
    }

    fn hv_vcpu_set_vtimer_offset(id: u64, offset: u64) {
        vcpu::own(id, |vcpu| {
            vcpu.emulation.state().timer.offset = offset;
            Ok(())
        })
    }
}
