//! General registers, the program counter, PSTATE, and vector registers.

use std::arch::x86_64::__m128i;

use crate::calls::{Code, Outcome, framework, give};
use crate::system_registers::{SP_EL0, SP_EL1};
use crate::unicorn::{Engine, UnicornError, register};
use crate::vcpu;

/// The numbers of `hv_reg_t` after X0 to X30.
const PC: u32 = 31;
const FPCR: u32 = 32;
const FPSR: u32 = 33;
const CPSR: u32 = 34;

/// Bits of PSTATE: the exception level, and whether it uses a stack pointer of its own.
const LEVEL: u64 = 0b11 << 2;
const OWN_STACK_POINTER: u64 = 1;

/// The bits of PSTATE that a CPU without memory tagging keeps (Arm ARM, C5.2): not TCO, and no bit
/// that is RES0.
const KEPT: u64 = 0xf1f0_1fdf;

/// Returns Unicorn's number of X0 to X30. 31 is the zero register.
pub(crate) fn general(number: u32) -> Option<i32> {
    match number {
        0..=28 => Some(register::X0 + number.cast_signed()),
        29 => Some(register::X29),
        30 => Some(register::X30),
        _ => None,
    }
}

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

/// Returns the system register that SP is with this PSTATE.
pub(crate) fn stack_pointer(pstate: u64) -> u16 {
    match (pstate & LEVEL, pstate & OWN_STACK_POINTER) {
        (0, _) | (_, 0) => SP_EL0,
        (_, _) => SP_EL1,
    }
}

/// Sets PSTATE, and SP to the stack pointer that it selects.
pub(crate) fn set_pstate(engine: &Engine, pstate: u64) -> Result<(), UnicornError> {
    let (old, new) = (
        stack_pointer(engine.read(register::PSTATE)?),
        stack_pointer(pstate),
    );
    if old != new {
        engine.write_system(old, engine.read(register::SP)?)?;
        engine.write::<u64>(register::SP, engine.read_system(new)?)?;
    }
    engine.write(register::PSTATE, pstate)
}

/// Converts an error of Unicorn, which no caller expects.
pub(crate) fn unexpected(error: UnicornError) -> Code {
    eprintln!("fake-hvf: Unicorn failed: {error:?}");
    Code::ERROR
}

fn vector(number: u32) -> Result<i32, Code> {
    match number {
        0..=31 => Ok(register::Q0 + number.cast_signed()),
        _ => Err(Code::BAD_ARGUMENT),
    }
}

fn set(id: u64, number: u32, value: u64) -> Outcome {
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
        set(id, number, value)
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
}
