//! General registers, PSTATE and the stack pointer in an engine.

use crate::calls::Code;
use crate::system_registers::{SP_EL0, SP_EL1};
use crate::unicorn::{Engine, UnicornError, register};

/// Bits of PSTATE: the exception level, and whether it uses a stack pointer of its own.
const LEVEL: u64 = 0b11 << 2;
const OWN_STACK_POINTER: u64 = 1;

/// Returns Unicorn's number of X0 to X30. 31 is the zero register.
pub(crate) fn general(number: u32) -> Option<i32> {
    match number {
        0..=28 => Some(register::X0 + number.cast_signed()),
        29 => Some(register::X29),
        30 => Some(register::X30),
        _ => None,
    }
}

/// Returns the exception level of a PSTATE: 0 or 1.
pub(crate) fn level(pstate: u64) -> usize {
    usize::from(pstate & LEVEL != 0)
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
