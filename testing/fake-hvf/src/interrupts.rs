//! Pending interrupts, and exceptions that the guest takes to its own level 1.

use crate::calls::Code;
use crate::registers;
use crate::system_registers::{ELR_EL1, SPSR_EL1, SystemRegisters, VBAR_EL1};
use crate::unicorn::{Engine, UnicornError, register};

/// `hv_interrupt_type_t` of Apple's header. `applevisor-sys` has the two names the other way round.
const IRQ: u32 = 0;
const FIQ: u32 = 1;

/// Bits of PSTATE.
const MASKED_FIQ: u64 = 1 << 6;
const MASKED_IRQ: u64 = 1 << 7;
const MASKED_ALL: u64 = 0b1111 << 6;
const LEVEL: u64 = 0b11 << 2;
const OWN_STACK_POINTER: u64 = 1;
const FLAGS: u64 = 0b1111 << 28;

/// The interrupts that are pending until the vCPU exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    pub irq: bool,
    pub fiq: bool,
}

impl Lines {
    pub(crate) fn any(self) -> bool {
        self.irq || self.fiq
    }

    /// Returns whether an interrupt is taken now, and whether it is an FIQ.
    pub(crate) fn taken(self, pstate: u64) -> Option<bool> {
        if self.fiq && pstate & MASKED_FIQ == 0 {
            return Some(true);
        }
        (self.irq && pstate & MASKED_IRQ == 0).then_some(false)
    }

    /// Returns these lines, with an IRQ if `irq`.
    pub(crate) fn with_irq(mut self, irq: bool) -> Self {
        self.irq |= irq;
        self
    }

    pub(crate) fn line(&mut self, kind: u32) -> Result<&mut bool, Code> {
        match kind {
            IRQ => Ok(&mut self.irq),
            FIQ => Ok(&mut self.fiq),
            _ => Err(Code::BAD_ARGUMENT),
        }
    }
}

/// The offset of the kind of exception from the start of a group of vectors.
#[derive(Clone, Copy)]
pub(crate) enum Vector {
    Synchronous = 0x000,
    Irq = 0x080,
    Fiq = 0x100,
}

/// An exception that the guest takes to its own level 1.
#[derive(Debug)]
pub(crate) struct GuestException {
    pub syndrome: u64,
    /// The value of ELR_EL1.
    pub return_address: u64,
    /// The value of FAR_EL1, of an abort.
    pub fault_address: Option<u64>,
}

/// Arm ARM, `AArch64.TakeException`.
pub(crate) fn enter_level_1(
    engine: &Engine,
    system: &SystemRegisters,
    vector: Vector,
    return_address: u64,
) -> Result<(), UnicornError> {
    let pstate: u64 = engine.read(register::PSTATE)?;
    let group = match (pstate & LEVEL, pstate & OWN_STACK_POINTER) {
        (0, _) => 0x400,
        (_, 0) => 0x000,
        (_, _) => 0x200,
    };
    engine.write_system(SPSR_EL1, pstate)?;
    engine.write_system(ELR_EL1, return_address)?;
    registers::set_pstate(engine, pstate & FLAGS | MASKED_ALL | 0b0101)?;
    engine.write(register::PC, system.get(VBAR_EL1) + group + vector as u64)
}
