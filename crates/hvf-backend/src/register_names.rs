//! The names and encodings of the system registers in a vCPU's state.
//!
//! The encodings are those of Apple's headers: `hv_sys_reg_t` of `Hypervisor/hv_vcpu_types.h`, and
//! `hv_gic_icc_reg_t` of `Hypervisor/hv_gic_types.h`. `macos/numbers.rs` compares them with those
//! of `applevisor-sys`.

/// Passes the registers of `hv_sys_reg_t` to a macro: all up to exception level 1, except for
/// CNTP_TVAL_EL0, which is another view of CNTP_CVAL_EL0.
macro_rules! system_registers {
    ($with:ident) => { $with! {
        DBGBVR0_EL1 = 0x8004, DBGBCR0_EL1 = 0x8005, DBGWVR0_EL1 = 0x8006, DBGWCR0_EL1 = 0x8007,
        DBGBVR1_EL1 = 0x800c, DBGBCR1_EL1 = 0x800d, DBGWVR1_EL1 = 0x800e, DBGWCR1_EL1 = 0x800f,
        MDCCINT_EL1 = 0x8010, MDSCR_EL1 = 0x8012, DBGBVR2_EL1 = 0x8014, DBGBCR2_EL1 = 0x8015,
        DBGWVR2_EL1 = 0x8016, DBGWCR2_EL1 = 0x8017, DBGBVR3_EL1 = 0x801c, DBGBCR3_EL1 = 0x801d,
        DBGWVR3_EL1 = 0x801e, DBGWCR3_EL1 = 0x801f, DBGBVR4_EL1 = 0x8024, DBGBCR4_EL1 = 0x8025,
        DBGWVR4_EL1 = 0x8026, DBGWCR4_EL1 = 0x8027, DBGBVR5_EL1 = 0x802c, DBGBCR5_EL1 = 0x802d,
        DBGWVR5_EL1 = 0x802e, DBGWCR5_EL1 = 0x802f, DBGBVR6_EL1 = 0x8034, DBGBCR6_EL1 = 0x8035,
        DBGWVR6_EL1 = 0x8036, DBGWCR6_EL1 = 0x8037, DBGBVR7_EL1 = 0x803c, DBGBCR7_EL1 = 0x803d,
        DBGWVR7_EL1 = 0x803e, DBGWCR7_EL1 = 0x803f, DBGBVR8_EL1 = 0x8044, DBGBCR8_EL1 = 0x8045,
        DBGWVR8_EL1 = 0x8046, DBGWCR8_EL1 = 0x8047, DBGBVR9_EL1 = 0x804c, DBGBCR9_EL1 = 0x804d,
        DBGWVR9_EL1 = 0x804e, DBGWCR9_EL1 = 0x804f, DBGBVR10_EL1 = 0x8054, DBGBCR10_EL1 = 0x8055,
        DBGWVR10_EL1 = 0x8056, DBGWCR10_EL1 = 0x8057, DBGBVR11_EL1 = 0x805c, DBGBCR11_EL1 = 0x805d,
        DBGWVR11_EL1 = 0x805e, DBGWCR11_EL1 = 0x805f, DBGBVR12_EL1 = 0x8064, DBGBCR12_EL1 = 0x8065,
        DBGWVR12_EL1 = 0x8066, DBGWCR12_EL1 = 0x8067, DBGBVR13_EL1 = 0x806c, DBGBCR13_EL1 = 0x806d,
        DBGWVR13_EL1 = 0x806e, DBGWCR13_EL1 = 0x806f, DBGBVR14_EL1 = 0x8074, DBGBCR14_EL1 = 0x8075,
        DBGWVR14_EL1 = 0x8076, DBGWCR14_EL1 = 0x8077, DBGBVR15_EL1 = 0x807c, DBGBCR15_EL1 = 0x807d,
        DBGWVR15_EL1 = 0x807e, DBGWCR15_EL1 = 0x807f, MIDR_EL1 = 0xc000, MPIDR_EL1 = 0xc005,
        ID_AA64PFR0_EL1 = 0xc020, ID_AA64PFR1_EL1 = 0xc021, ID_AA64ZFR0_EL1 = 0xc024,
        ID_AA64SMFR0_EL1 = 0xc025, ID_AA64DFR0_EL1 = 0xc028, ID_AA64DFR1_EL1 = 0xc029,
        ID_AA64ISAR0_EL1 = 0xc030, ID_AA64ISAR1_EL1 = 0xc031, ID_AA64MMFR0_EL1 = 0xc038,
        ID_AA64MMFR1_EL1 = 0xc039, ID_AA64MMFR2_EL1 = 0xc03a, SCTLR_EL1 = 0xc080,
        ACTLR_EL1 = 0xc081, CPACR_EL1 = 0xc082, SMPRI_EL1 = 0xc094, SMCR_EL1 = 0xc096,
        TTBR0_EL1 = 0xc100, TTBR1_EL1 = 0xc101, TCR_EL1 = 0xc102, APIAKEYLO_EL1 = 0xc108,
        APIAKEYHI_EL1 = 0xc109, APIBKEYLO_EL1 = 0xc10a, APIBKEYHI_EL1 = 0xc10b,
        APDAKEYLO_EL1 = 0xc110, APDAKEYHI_EL1 = 0xc111, APDBKEYLO_EL1 = 0xc112,
        APDBKEYHI_EL1 = 0xc113, APGAKEYLO_EL1 = 0xc118, APGAKEYHI_EL1 = 0xc119, SPSR_EL1 = 0xc200,
        ELR_EL1 = 0xc201, SP_EL0 = 0xc208, AFSR0_EL1 = 0xc288, AFSR1_EL1 = 0xc289, ESR_EL1 = 0xc290,
        FAR_EL1 = 0xc300, PAR_EL1 = 0xc3a0, MAIR_EL1 = 0xc510, AMAIR_EL1 = 0xc518,
        VBAR_EL1 = 0xc600, CONTEXTIDR_EL1 = 0xc681, TPIDR_EL1 = 0xc684, SCXTNUM_EL1 = 0xc687,
        CNTKCTL_EL1 = 0xc708, CSSELR_EL1 = 0xd000, TPIDR_EL0 = 0xde82, TPIDRRO_EL0 = 0xde83,
        TPIDR2_EL0 = 0xde85, SCXTNUM_EL0 = 0xde87, CNTP_CTL_EL0 = 0xdf11, CNTP_CVAL_EL0 = 0xdf12,
        CNTV_CTL_EL0 = 0xdf19, CNTV_CVAL_EL0 = 0xdf1a, SP_EL1 = 0xe208,
    } };
}
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub(crate) use system_registers;

/// Passes the registers of `hv_gic_icc_reg_t` to a macro, without their prefix `ICC_`.
macro_rules! gic_cpu_registers {
    ($with:ident) => {
        $with! {
            PMR_EL1 = 0xc230, BPR0_EL1 = 0xc643, AP0R0_EL1 = 0xc644, AP1R0_EL1 = 0xc648,
            RPR_EL1 = 0xc65b, BPR1_EL1 = 0xc663, CTLR_EL1 = 0xc664, SRE_EL1 = 0xc665,
            IGRPEN0_EL1 = 0xc666, IGRPEN1_EL1 = 0xc667,
        }
    };
}
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
pub(crate) use gic_cpu_registers;

macro_rules! named {
    ($($name:ident = $encoding:literal,)*) => { &[$((stringify!($name), $encoding),)*] };
}

macro_rules! named_icc {
    ($($name:ident = $encoding:literal,)*) => {
        &[$((concat!("ICC_", stringify!($name)), $encoding),)*]
    };
}

const TABLES: [&[(&str, u16)]; 2] = [system_registers!(named), gic_cpu_registers!(named_icc)];

/// Returns the name of the register with this encoding.
pub(crate) fn name(encoding: u16) -> Option<&'static str> {
    let mut all = TABLES.into_iter().flatten();
    let found = all.find(|(_, known)| *known == encoding);
    found.map(|(name, _)| *name)
}

/// Returns the encoding of the register with this name.
pub(crate) fn encoding(name: &str) -> Option<u16> {
    let mut all = TABLES.into_iter().flatten();
    let found = all.find(|(known, _)| *known == name);
    found.map(|(_, encoding)| *encoding)
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_and_encodings_are_unique() {
        let all = || TABLES.into_iter().flatten();
        let names: BTreeSet<_> = all().map(|(name, _)| name).collect();
        let encodings: BTreeSet<_> = all().map(|(_, encoding)| encoding).collect();
        assert_eq!(
            (names.len(), encodings.len()),
            (all().count(), all().count())
        );
        for (register, number) in all() {
            assert_eq!(name(*number), Some(*register));
            assert_eq!(encoding(register), Some(*number));
        }
    }
}
