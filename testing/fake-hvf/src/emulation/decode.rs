//! What an instruction at which the engine stopped means (Arm ARM, C4 and D24).

use crate::exit::{Exit, ExitException};
use crate::interrupts::GuestException;
use crate::state::Stop;

/// Exception classes (ESR_ELx.EC).
const UNKNOWN: u64 = 0x00;
const WAIT: u64 = 0x01;
const SVC: u64 = 0x15;
const HVC: u64 = 0x16;
const SMC: u64 = 0x17;
pub(super) const INSTRUCTION_ABORT: u64 = 0x20;
pub(super) const DATA_ABORT: u64 = 0x24;
const BRK: u64 = 0x3c;

/// The numbers of exceptions in Unicorn (`target/arm/cpu.h`).
const UNDEFINED: u32 = 1;
const SUPERVISOR_CALL: u32 = 2;
const BREAKPOINT: u32 = 7;
const HYPERVISOR_CALL: u32 = 11;
const MONITOR_CALL: u32 = 13;

const WFI: u32 = 0xd503_207f;
const WFE: u32 = 0xd503_205f;

/// Returns a syndrome of an instruction of 32 bits.
pub(super) fn syndrome(class: u64, specific: u64) -> u64 {
    class << 26 | 1 << 25 | specific
}

fn exit(syndrome: u64, pc: u64) -> Stop {
    let exception = ExitException {
        syndrome,
        ..ExitException::default()
    };
    Stop::Exit(Exit::Exception(exception), pc)
}

/// Returns the operand of an instruction of exception generation, if it is one of this kind.
fn operand(instruction: u32, kind: u32) -> Option<u64> {
    let matches = instruction & 0xffe0_001f == kind;
    matches.then_some(u64::from(instruction >> 5 & 0xffff))
}

/// Returns why the engine stopped at an exception of this instruction at `pc`.
pub(super) fn exception(number: u32, pc: u64, instruction: u32, trap_breakpoints: bool) -> Stop {
    match number {
        UNDEFINED | SUPERVISOR_CALL | BREAKPOINT | HYPERVISOR_CALL | MONITOR_CALL => {}
        other => return Stop::Unsupported(format!("exception {other} of Unicorn")),
    }
    // The preferred return address is the next instruction of a call that is not trapped.
    if let Some(operand) = operand(instruction, 0xd400_0002) {
        return exit(syndrome(HVC, operand), pc + 4);
    }
    if let Some(operand) = operand(instruction, 0xd400_0003) {
        return exit(syndrome(SMC, operand), pc);
    }
    let guest = |syndrome, return_address| {
        Stop::Exception(GuestException {
            syndrome,
            return_address,
            fault_address: None,
        })
    };
    if let Some(operand) = operand(instruction, 0xd400_0001) {
        return guest(syndrome(SVC, operand), pc + 4);
    }
    match operand(instruction, 0xd420_0000) {
        Some(operand) if trap_breakpoints => exit(syndrome(BRK, operand), pc),
        Some(operand) => guest(syndrome(BRK, operand), pc),
        None => guest(syndrome(UNKNOWN, 0), pc),
    }
}

/// Returns the exit of a vCPU that waits by this instruction at `pc`, if it does.
pub(super) fn idle(pc: u64, instruction: u32) -> Option<Stop> {
    // COND is always, and valid.
    let condition = 0b1_1110 << 20;
    match instruction {
        WFI => Some(exit(syndrome(WAIT, condition), pc)),
        WFE => Some(exit(syndrome(WAIT, condition | 1), pc)),
        _ => None,
    }
}

impl Exit {
    /// Returns whether the guest has executed `wfi`.
    pub(super) fn is_wait_for_interrupt(&self) -> bool {
        matches!(self, Self::Exception(exception)
            if exception.syndrome >> 26 == WAIT && exception.syndrome & 1 == 0)
    }
}

/// Returns the number of the general register of an instruction of system registers.
pub(super) fn register_operand(instruction: u32) -> u32 {
    instruction & 0x1f
}

/// Returns whether a system instruction invalidates instruction caches: `ic ialluis`, `ic iallu`,
/// `ic ivau`.
pub(super) fn invalidates_code(encoding: u16) -> bool {
    matches!(encoding, 0x4388 | 0x43a8 | 0x5ba9)
}

/// Returns whether a system instruction invalidates translations of addresses: `tlbi`.
pub(super) fn invalidates_translations(encoding: u16) -> bool {
    let (op0, crn) = (encoding >> 14, encoding >> 7 & 0xf);
    (op0, crn) == (1, 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unicorn::SystemRegister;

    #[test]
    fn operands_are_those_of_the_same_kind_only() {
        assert_eq!(operand(0xd400_0002 | 7 << 5, 0xd400_0002), Some(7));
        assert_eq!(operand(0xd400_0001 | 7 << 5, 0xd400_0002), None);
        assert_eq!(
            operand(0xd420_0000 | 0xffff << 5, 0xd420_0000),
            Some(0xffff)
        );
    }

    #[test]
    fn encodings_have_the_fields_of_the_instruction() {
        // sys #3, c7, c5, #1
        assert_eq!(SystemRegister::new(0x5ba9, 0).encoding(), 0x5ba9);
        let encoding = |op1: u16, crm: u16, op2| 1 << 14 | op1 << 11 | 7 << 7 | crm << 3 | op2;
        assert!(invalidates_code(encoding(3, 5, 1)));
        assert!(invalidates_code(encoding(0, 5, 0)));
        assert!(invalidates_code(encoding(0, 1, 0)));
        assert!(!invalidates_code(encoding(3, 4, 1))); // dc zva
        assert!(!invalidates_translations(encoding(0, 8, 0))); // at s1e1r
        assert!(invalidates_translations(1 << 14 | 8 << 7 | 7 << 3)); // tlbi vmalle1
    }
}
