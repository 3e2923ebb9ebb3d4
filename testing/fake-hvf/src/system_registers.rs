//! System registers.
//!
//! Most are values in a table, which the guest reads and writes too. Unicorn has those that its own
//! instructions use.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use crate::calls::{Code, Outcome, framework, give};
use crate::emulation::State;
use crate::registers::{stack_pointer, unexpected};
use crate::systems::{self, System};
use crate::unicorn::{Engine, UnicornError, register};
use crate::{control, gic, timer, vcpu};

pub(crate) const CPACR_EL1: u16 = 0xc082;
pub(crate) const SPSR_EL1: u16 = 0xc200;
pub(crate) const ELR_EL1: u16 = 0xc201;
pub(crate) const SP_EL0: u16 = 0xc208;
pub(crate) const SP_EL1: u16 = 0xe208;
pub(crate) const ESR_EL1: u16 = 0xc290;
pub(crate) const VBAR_EL1: u16 = 0xc600;
pub(crate) const CNTV_CTL_EL0: u16 = 0xdf19;
pub(crate) const CNTV_CVAL_EL0: u16 = 0xdf1a;
const MPIDR_EL1: u16 = 0xc005;
const ID_AA64PFR1_EL1: u16 = 0xc021;
const ID_AA64DFR0_EL1: u16 = 0xc028;
const CNTV_TVAL_EL0: u16 = 0xdf18;
const CNTFRQ_EL0: u16 = 0xdf00;
const CNTVCT_EL0: u16 = 0xdf02;

/// The registers that Unicorn has.
const IN_ENGINE: [u16; 4] = [SPSR_EL1, ELR_EL1, SP_EL0, SP_EL1];

/// Registers that identify the CPU, with the values of an M4, where known.
const IDENTIFICATION: [(u16, u64); 11] = [
    (0xc000, 0x610f_0000),            // MIDR_EL1: Apple
    (MPIDR_EL1, 1 << 31),             // MPIDR_EL1
    (0xc020, 0x1101_0000_1101_1111),  // ID_AA64PFR0_EL1
    (ID_AA64PFR1_EL1, 0x2_0200_0001), // SME2 in bits 27 to 24
    (ID_AA64DFR0_EL1, 0x1030_5006),   // 6 breakpoints, 4 watchpoints
    (0xc029, 0),                      // ID_AA64DFR1_EL1
    (0xc030, 0x0221_1110_1121_2120),  // ID_AA64ISAR0_EL1
    (0xc031, 0x0000_0111_0021_1402),  // ID_AA64ISAR1_EL1
    (0xc038, 0x0000_0100_0f10_0022),  // ID_AA64MMFR0_EL1: 40 address bits
    (0xc039, 0x1121_2000),            // ID_AA64MMFR1_EL1
    (0xc03a, 0x1001_0110_0001_1011),  // ID_AA64MMFR2_EL1
];

/// The other registers of every vCPU.
const PLAIN: [u16; 33] = [
    0x8010, // MDCCINT_EL1
    0x8012, // MDSCR_EL1
    0xc080, // SCTLR_EL1
    CPACR_EL1,
    0xc100, // TTBR0_EL1
    0xc101, // TTBR1_EL1
    0xc102, // TCR_EL1
    0xc108, // APIAKEYLO_EL1
    0xc109,
    0xc10a,
    0xc10b,
    0xc110, // APDAKEYLO_EL1
    0xc111,
    0xc112,
    0xc113,
    0xc118, // APGAKEYLO_EL1
    0xc119,
    0xc288, // AFSR0_EL1
    0xc289, // AFSR1_EL1
    ESR_EL1,
    0xc300, // FAR_EL1
    0xc3a0, // PAR_EL1
    0xc510, // MAIR_EL1
    0xc518, // AMAIR_EL1
    VBAR_EL1,
    0xc681, // CONTEXTIDR_EL1
    0xc684, // TPIDR_EL1
    0xc708, // CNTKCTL_EL1
    0xd000, // CSSELR_EL1
    0xde82, // TPIDR_EL0
    0xde83, // TPIDRRO_EL0
    CNTV_CTL_EL0,
    CNTV_CVAL_EL0,
];

/// The registers that are accessible since a later version.
const LATER: [(u16, System); 8] = [
    (0xc081, System::MacOs15),   // ACTLR_EL1
    (0xc024, System::MacOs15_2), // ID_AA64ZFR0_EL1
    (0xc025, System::MacOs15_2), // ID_AA64SMFR0_EL1
    (0xc094, System::MacOs15_2), // SMPRI_EL1
    (0xc096, System::MacOs15_2), // SMCR_EL1
    (0xc687, System::MacOs15_2), // SCXTNUM_EL1
    (0xde85, System::MacOs15_2), // TPIDR2_EL0
    (0xde87, System::MacOs15_2), // SCXTNUM_EL0
];

/// The registers of a CPU with the scalable matrix extension: ID_AA64ZFR0_EL1, ID_AA64SMFR0_EL1,
/// SMPRI_EL1, SMCR_EL1 and TPIDR2_EL0.
const OF_SME: [u16; 5] = [0xc024, 0xc025, 0xc094, 0xc096, 0xde85];

/// The physical timer, of a machine with an interrupt controller: CNTP_TVAL_EL0, CNTP_CTL_EL0 and
/// CNTP_CVAL_EL0.
const PHYSICAL_TIMER: [u16; 3] = [0xdf10, CNTP_CTL_EL0, CNTP_CVAL_EL0];
pub(crate) const CNTP_CTL_EL0: u16 = 0xdf11;
pub(crate) const CNTP_CVAL_EL0: u16 = 0xdf12;

/// The values of the registers that Unicorn does not have.
#[derive(Debug)]
pub(crate) struct SystemRegisters(BTreeMap<u16, u64>);

impl Default for SystemRegisters {
    fn default() -> Self {
        let plain = PLAIN.map(|register| (register, 0));
        let later = LATER.map(|(register, _)| (register, 0));
        let all = IDENTIFICATION.into_iter().chain(plain).chain(later);
        let mut registers: BTreeMap<_, _> = all.collect();
        if !control::has_sme() {
            registers.insert(ID_AA64PFR1_EL1, 1);
            registers.retain(|register, _| !OF_SME.contains(register));
        }
        registers.extend(&*control::identification());
        Self(registers)
    }
}

impl SystemRegisters {
    /// Returns the value of a register of this crate.
    pub(crate) fn get(&self, register: u16) -> u64 {
        self.0.get(&register).copied().unwrap_or_default()
    }

    pub(crate) fn set(&mut self, register: u16, value: u64) {
        self.0.insert(register, value);
    }

    /// Returns whether a vCPU has the register.
    fn has(&self, register: u16) -> bool {
        self.0.contains_key(&register) || self.has_debug(register)
    }

    /// Returns whether it is a register of a breakpoint or watchpoint that exists: op0 2, op1 0,
    /// CRn 0, CRm the number, op2 4 to 7.
    fn has_debug(&self, register: u16) -> bool {
        if register & 0xff84 != 0x8004 {
            return false;
        }
        let number = u64::from(register >> 3 & 0xf);
        let from = if register & 0b010 == 0 { 12 } else { 20 };
        number <= self.get(ID_AA64DFR0_EL1) >> from & 0xf
    }
}

impl State {
    /// Returns what the guest reads from a register of this crate.
    pub(crate) fn guest_reads(&self, register: u16) -> Option<u64> {
        match register {
            CNTVCT_EL0 => Some(self.counter()),
            CNTFRQ_EL0 => Some(timer::FREQUENCY),
            CNTV_TVAL_EL0 => Some(self.system.get(CNTV_CVAL_EL0).wrapping_sub(self.counter())),
            CNTV_CTL_EL0 => Some(self.timer_control()),
            _ if self.system.has(register) => Some(self.system.get(register)),
            _ => None,
        }
    }

    /// Writes a register of this crate for the guest. Returns whether the instruction is done.
    pub(crate) fn guest_writes(&mut self, register: u16, value: u64) -> bool {
        match register {
            CNTV_TVAL_EL0 => {
                // A signed difference of 32 bits.
                let difference = i64::from(value as u32 as i32).cast_unsigned();
                let at = self.counter().wrapping_add(difference);
                self.system.set(CNTV_CVAL_EL0, at);
            }
            _ if self.system.has(register) => self.system.set(register, value),
            _ => return false,
        }
        // Unicorn traps vector instructions by its own CPACR_EL1.
        register != CPACR_EL1
    }

    /// Returns whether the framework accesses the register of this vCPU.
    fn is_accessible(&self, register: u16) -> bool {
        if PHYSICAL_TIMER.contains(&register) {
            return gic::exists();
        }
        let mut later = LATER.iter();
        let since = later.find(|(later, _)| *later == register);
        self.system.has(register) && since.is_none_or(|(_, since)| *since <= systems::current())
    }

    fn read(&self, engine: &Engine, register: u16) -> Result<u64, Code> {
        match register {
            CNTV_CTL_EL0 => Ok(self.timer_control()),
            CNTP_CTL_EL0 if self.is_accessible(register) => Ok(self.physical_timer_control()),
            _ if IN_ENGINE.contains(&register) => {
                read_from_engine(engine, register).map_err(unexpected)
            }
            _ if self.is_accessible(register) => Ok(self.system.get(register)),
            _ => Err(Code::BAD_ARGUMENT),
        }
    }

    fn write(&mut self, engine: &Engine, register: u16, value: u64) -> Outcome {
        if IN_ENGINE.contains(&register) {
            return write_to_engine(engine, register, value).map_err(unexpected);
        }
        if !self.is_accessible(register) {
            return Err(Code::BAD_ARGUMENT);
        }
        if control::kept().contains(&register) {
            return Ok(());
        }
        let value = match register {
            MPIDR_EL1 => {
                // Bit 31 is always 1.
                let value = value | 1 << 31;
                self.shared.affinity.store(value, Ordering::SeqCst);
                value
            }
            CPACR_EL1 => {
                engine.write_system(register, value).map_err(unexpected)?;
                value
            }
            _ => value,
        };
        self.system.set(register, value);
        Ok(())
    }
}

/// Returns whether the register is the stack pointer in use. Unicorn has its value in SP only.
fn is_in_use(engine: &Engine, register: u16) -> Result<bool, UnicornError> {
    Ok(stack_pointer(engine.read(register::PSTATE)?) == register)
}

fn read_from_engine(engine: &Engine, register: u16) -> Result<u64, UnicornError> {
    match is_in_use(engine, register)? {
        true => engine.read(register::SP),
        false => engine.read_system(register),
    }
}

fn write_to_engine(engine: &Engine, register: u16, value: u64) -> Result<(), UnicornError> {
    match is_in_use(engine, register)? {
        true => engine.write(register::SP, value),
        false => engine.write_system(register, value),
    }
}

framework! {
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
}
