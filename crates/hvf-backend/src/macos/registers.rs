//! The registers of a vCPU.

use applevisor_sys::{hv_error_t, hv_reg_t as G, hv_simd_fp_reg_t as Q, hv_sys_reg_t as R};

use super::errors::HvError;
use super::vcpu::Vcpu;

/// The general registers X0 to X30.
pub(crate) const GENERAL: [G; 31] = [
    G::X0,
    G::X1,
    G::X2,
    G::X3,
    G::X4,
    G::X5,
    G::X6,
    G::X7,
    G::X8,
    G::X9,
    G::X10,
    G::X11,
    G::X12,
    G::X13,
    G::X14,
    G::X15,
    G::X16,
    G::X17,
    G::X18,
    G::X19,
    G::X20,
    G::X21,
    G::X22,
    G::X23,
    G::X24,
    G::X25,
    G::X26,
    G::X27,
    G::X28,
    G::X29,
    G::X30,
];

/// The vector registers Q0 to Q31.
pub(crate) const SIMD: [Q; 32] = [
    Q::Q0,
    Q::Q1,
    Q::Q2,
    Q::Q3,
    Q::Q4,
    Q::Q5,
    Q::Q6,
    Q::Q7,
    Q::Q8,
    Q::Q9,
    Q::Q10,
    Q::Q11,
    Q::Q12,
    Q::Q13,
    Q::Q14,
    Q::Q15,
    Q::Q16,
    Q::Q17,
    Q::Q18,
    Q::Q19,
    Q::Q20,
    Q::Q21,
    Q::Q22,
    Q::Q23,
    Q::Q24,
    Q::Q25,
    Q::Q26,
    Q::Q27,
    Q::Q28,
    Q::Q29,
    Q::Q30,
    Q::Q31,
];

/// The system registers of every vCPU except those of breakpoints and watchpoints, in the order in
/// which they are written.
///
/// The registers of exception level 2 are not included, because no machine of this crate has that
/// level.
const SYSTEM: &[R] = &[
    // Identification of the CPU. The guest may depend on these.
    R::MIDR_EL1,
    R::MPIDR_EL1,
    R::ID_AA64PFR0_EL1,
    R::ID_AA64PFR1_EL1,
    R::ID_AA64DFR0_EL1,
    R::ID_AA64DFR1_EL1,
    R::ID_AA64ISAR0_EL1,
    R::ID_AA64ISAR1_EL1,
    R::ID_AA64MMFR0_EL1,
    R::ID_AA64MMFR1_EL1,
    R::ID_AA64MMFR2_EL1,
    // Translation and control.
    R::SCTLR_EL1,
    R::CPACR_EL1,
    R::TTBR0_EL1,
    R::TTBR1_EL1,
    R::TCR_EL1,
    R::MAIR_EL1,
    R::AMAIR_EL1,
    R::CONTEXTIDR_EL1,
    R::PAR_EL1,
    R::CSSELR_EL1,
    // Pointer authentication.
    R::APIAKEYLO_EL1,
    R::APIAKEYHI_EL1,
    R::APIBKEYLO_EL1,
    R::APIBKEYHI_EL1,
    R::APDAKEYLO_EL1,
    R::APDAKEYHI_EL1,
    R::APDBKEYLO_EL1,
    R::APDBKEYHI_EL1,
    R::APGAKEYLO_EL1,
    R::APGAKEYHI_EL1,
    // Exceptions.
    R::VBAR_EL1,
    R::SPSR_EL1,
    R::ELR_EL1,
    R::ESR_EL1,
    R::FAR_EL1,
    R::AFSR0_EL1,
    R::AFSR1_EL1,
    R::SP_EL0,
    R::SP_EL1,
    // Threads.
    R::TPIDR_EL0,
    R::TPIDRRO_EL0,
    R::TPIDR_EL1,
    // Debugging.
    R::MDCCINT_EL1,
    R::MDSCR_EL1,
    // The virtual timer: the compare value before the control register that enables it.
    R::CNTKCTL_EL1,
    R::CNTV_CVAL_EL0,
    R::CNTV_CTL_EL0,
];

/// The registers that not every system or CPU has: since macOS 15 the memory model of the guest
/// (ACTLR_EL1.EnTSO, for translated x86 programs), and since macOS 15.2 those of the scalable
/// matrix extension and the software context numbers (`Hypervisor/hv_vcpu_types.h`).
const LATER: &[R] = &[
    R::ID_AA64ZFR0_EL1,
    R::ID_AA64SMFR0_EL1,
    R::ACTLR_EL1,
    R::SMPRI_EL1,
    R::SMCR_EL1,
    R::TPIDR2_EL0,
    R::SCXTNUM_EL0,
    R::SCXTNUM_EL1,
];

/// The value and control registers of each breakpoint of the architecture.
const BREAKPOINTS: [[R; 2]; 16] = [
    [R::DBGBVR0_EL1, R::DBGBCR0_EL1],
    [R::DBGBVR1_EL1, R::DBGBCR1_EL1],
    [R::DBGBVR2_EL1, R::DBGBCR2_EL1],
    [R::DBGBVR3_EL1, R::DBGBCR3_EL1],
    [R::DBGBVR4_EL1, R::DBGBCR4_EL1],
    [R::DBGBVR5_EL1, R::DBGBCR5_EL1],
    [R::DBGBVR6_EL1, R::DBGBCR6_EL1],
    [R::DBGBVR7_EL1, R::DBGBCR7_EL1],
    [R::DBGBVR8_EL1, R::DBGBCR8_EL1],
    [R::DBGBVR9_EL1, R::DBGBCR9_EL1],
    [R::DBGBVR10_EL1, R::DBGBCR10_EL1],
    [R::DBGBVR11_EL1, R::DBGBCR11_EL1],
    [R::DBGBVR12_EL1, R::DBGBCR12_EL1],
    [R::DBGBVR13_EL1, R::DBGBCR13_EL1],
    [R::DBGBVR14_EL1, R::DBGBCR14_EL1],
    [R::DBGBVR15_EL1, R::DBGBCR15_EL1],
];

/// The value and control registers of each watchpoint of the architecture.
const WATCHPOINTS: [[R; 2]; 16] = [
    [R::DBGWVR0_EL1, R::DBGWCR0_EL1],
    [R::DBGWVR1_EL1, R::DBGWCR1_EL1],
    [R::DBGWVR2_EL1, R::DBGWCR2_EL1],
    [R::DBGWVR3_EL1, R::DBGWCR3_EL1],
    [R::DBGWVR4_EL1, R::DBGWCR4_EL1],
    [R::DBGWVR5_EL1, R::DBGWCR5_EL1],
    [R::DBGWVR6_EL1, R::DBGWCR6_EL1],
    [R::DBGWVR7_EL1, R::DBGWCR7_EL1],
    [R::DBGWVR8_EL1, R::DBGWCR8_EL1],
    [R::DBGWVR9_EL1, R::DBGWCR9_EL1],
    [R::DBGWVR10_EL1, R::DBGWCR10_EL1],
    [R::DBGWVR11_EL1, R::DBGWCR11_EL1],
    [R::DBGWVR12_EL1, R::DBGWCR12_EL1],
    [R::DBGWVR13_EL1, R::DBGWCR13_EL1],
    [R::DBGWVR14_EL1, R::DBGWCR14_EL1],
    [R::DBGWVR15_EL1, R::DBGWCR15_EL1],
];

/// Returns the register with this encoding, if this version of the crate knows it.
pub(crate) fn by_encoding(encoding: u16) -> Option<R> {
    let mut known = SYSTEM
        .iter()
        .chain(LATER)
        .chain(BREAKPOINTS.as_flattened())
        .chain(WATCHPOINTS.as_flattened());
    known
        .find(|register| **register as u16 == encoding)
        .copied()
}

/// Returns the system registers of this vCPU.
pub(crate) fn system(vcpu: &Vcpu) -> Result<impl Iterator<Item = R>, HvError> {
    // Arm ARM, ID_AA64DFR0_EL1: BRPs in bits 15 to 12, WRPs in bits 23 to 20, each minus 1.
    let debug = vcpu.system_register(R::ID_AA64DFR0_EL1)?;
    let count = |from: u32| (debug >> from & 0xf) as usize + 1;
    let (breakpoints, watchpoints) = (count(12), count(20));
    Ok(SYSTEM
        .iter()
        .chain(LATER)
        .chain(BREAKPOINTS[..breakpoints].as_flattened())
        .chain(WATCHPOINTS[..watchpoints].as_flattened())
        .copied())
}

/// Returns whether the result of reading a register means that this system or CPU does not have it.
pub(crate) fn is_missing(register: R, read: &Result<u64, HvError>) -> bool {
    let missing = [hv_error_t::HV_BAD_ARGUMENT, hv_error_t::HV_UNSUPPORTED];
    LATER.contains(&register)
        && read
            .as_ref()
            .is_err_and(|error| missing.into_iter().any(|code| error.is(code)))
}

/// Returns the bits of a register that only the CPU sets: ISTATUS of CNTV_CTL_EL0 and CNTP_CTL_EL0,
/// which is set when the timer condition is met (Arm ARM, CNTV_CTL_EL0).
pub(crate) fn read_only_bits(register: R) -> u64 {
    match register {
        R::CNTV_CTL_EL0 | R::CNTP_CTL_EL0 => 1 << 2,
        _ => 0,
    }
}

/// Returns the bits of a register that a CPU may keep. The others are RES0, and read as 0 or as
/// they were written.
pub(crate) fn kept_bits(register: G) -> u64 {
    match register {
        // Arm ARM, SPSR_EL1, exception taken from AArch64 state: N, Z, C, V in 31 to 28, TCO, DIT,
        // UAO, PAN, SS and IL in 25 to 20, ALLINT, SSBS and BTYPE in 13 to 10, D, A, I, F in 9 to
        // 6, M in 4 to 0.
        G::CPSR => 0xf3f0_3fdf,
        // Arm ARM, FPCR: AHP, DN, FZ and RMode in 26 to 22, FZ16 in 19, IDE in 15, EBF in 13, the
        // enables of traps in 12 to 8, NEP, AH and FIZ in 2 to 0. Len and Stride are of AArch32.
        G::FPCR => 0x07c8_bf07,
        // Arm ARM, FPSR: QC in 27, IDC in 7, and the cumulative exceptions in 4 to 0. N, Z, C and
        // V are of AArch32.
        G::FPSR => 0x0800_009f,
        _ => u64::MAX,
    }
}

/// Returns whether a register identifies the CPU.
pub(crate) fn is_identification(register: R) -> bool {
    // Op0 3, op1 0, CRn 0: the identification registers, MIDR_EL1 and MPIDR_EL1 among them.
    register as u16 >> 7 == 0xc000 >> 7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_both_timers_is_not_compared() {
        assert_eq!(read_only_bits(R::CNTV_CTL_EL0), 0b100);
        assert_eq!(read_only_bits(R::CNTP_CTL_EL0), 0b100);
        assert_eq!(read_only_bits(R::CNTV_CVAL_EL0), 0);
    }
}
