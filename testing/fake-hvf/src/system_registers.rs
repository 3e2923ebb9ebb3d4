//! System registers.
//!
//! Most are values in a table, which the guest reads and writes too. Unicorn has those that its own
//! instructions use.

use std::collections::BTreeMap;

use crate::host;
use crate::systems::{self, System};

pub(crate) const SCTLR_EL1: u16 = 0xc080;
pub(crate) const CPACR_EL1: u16 = 0xc082;
pub(crate) const TTBR0_EL1: u16 = 0xc100;
pub(crate) const TTBR1_EL1: u16 = 0xc101;
pub(crate) const TCR_EL1: u16 = 0xc102;
pub(crate) const SPSR_EL1: u16 = 0xc200;
pub(crate) const ELR_EL1: u16 = 0xc201;
pub(crate) const SP_EL0: u16 = 0xc208;
pub(crate) const SP_EL1: u16 = 0xe208;
pub(crate) const ESR_EL1: u16 = 0xc290;
pub(crate) const FAR_EL1: u16 = 0xc300;
pub(crate) const VBAR_EL1: u16 = 0xc600;
pub(crate) const CNTV_CTL_EL0: u16 = 0xdf19;
pub(crate) const CNTV_CVAL_EL0: u16 = 0xdf1a;
pub(crate) const MPIDR_EL1: u16 = 0xc005;
const ID_AA64PFR1_EL1: u16 = 0xc021;
const ID_AA64DFR0_EL1: u16 = 0xc028;
pub(crate) const ID_AA64MMFR1_EL1: u16 = 0xc039;
pub(crate) const CNTV_TVAL_EL0: u16 = 0xdf18;
pub(crate) const CNTFRQ_EL0: u16 = 0xdf00;
pub(crate) const CNTVCT_EL0: u16 = 0xdf02;

/// The registers that Unicorn has.
pub(crate) const IN_ENGINE: [u16; 4] = [SPSR_EL1, ELR_EL1, SP_EL0, SP_EL1];

/// The registers that decide how the guest's addresses are translated.
pub(crate) const OF_TRANSLATION: [u16; 4] = [SCTLR_EL1, TTBR0_EL1, TTBR1_EL1, TCR_EL1];

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
    (ID_AA64MMFR1_EL1, 0x1121_2000),
    (0xc03a, 0x1001_0110_0001_1011), // ID_AA64MMFR2_EL1
];

/// The other registers of every vCPU.
const PLAIN: [u16; 33] = [
    0x8010, // MDCCINT_EL1
    0x8012, // MDSCR_EL1
    SCTLR_EL1,
    CPACR_EL1,
    TTBR0_EL1,
    TTBR1_EL1,
    TCR_EL1,
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
    FAR_EL1,
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
pub(crate) const PHYSICAL_TIMER: [u16; 3] = [0xdf10, CNTP_CTL_EL0, CNTP_CVAL_EL0];
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
        if !host::has_sme() {
            registers.insert(ID_AA64PFR1_EL1, 1);
            registers.retain(|register, _| !OF_SME.contains(register));
        }
        registers.extend(&*host::identification());
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

    /// Returns whether a vCPU has the register, and the framework of this system knows it.
    pub(crate) fn is_known(&self, register: u16) -> bool {
        let mut later = LATER.iter();
        let since = later.find(|(later, _)| *later == register);
        self.has(register) && since.is_none_or(|(_, since)| *since <= systems::current())
    }

    /// Returns whether a vCPU has the register.
    pub(crate) fn has(&self, register: u16) -> bool {
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
