//! The fields of the identification registers, and how their values compare.
//!
//! Names, positions and meanings are those of the Arm ARM, "Principles of the ID scheme for fields
//! in ID registers" and the description of each register.

use super::Order::{self, Exact, Machine, Signed, Unsigned};

/// A field of an identification register.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub name: &'static str,
    pub from: u32,
    pub bits: u32,
    pub order: Order,
}

const fn field(name: &'static str, from: u32, bits: u32, order: Order) -> Field {
    Field {
        name,
        from,
        bits,
        order,
    }
}

/// Defines the fields of a register: the lowest bit of each, its size unless it is 4, and its order
/// unless it is unsigned.
macro_rules! fields {
    ($($name:ident $from:literal $(: $bits:literal)? $(= $order:ident)?),* $(,)?) => {
        &[$(field(stringify!($name), $from, fields!(@bits $($bits)?), fields!(@order $($order)?))),*]
    };
    (@bits) => { 4 };
    (@bits $bits:literal) => { $bits };
    (@order) => { Unsigned };
    (@order $order:ident) => { $order };
}

/// The registers with the encoding of each, and its fields.
///
/// - The fields of pointer authentication (APA, API, GPA, GPI) are compared for equality. Another
///   value is another algorithm, and signed pointers are in the guest's memory.
/// - GIC is of the machine, and VMMs with an interrupt controller of their own set it. TGran4_2,
///   TGran16_2 and TGran64_2 are of stage 2, which only guests at exception level 2 have.
/// - SpecSEI, DPFZS and SYSPMUID state properties of the CPU that software does not select.
pub(super) const REGISTERS: [(u16, &[Field]); 11] = [
    // ID_AA64PFR0_EL1
    (
        0xc020,
        fields![
            EL0 0, EL1 4, EL2 8, EL3 12, FP 16 = Signed, AdvSIMD 20 = Signed, GIC 24 = Machine, RAS 28,
            SVE 32, SEL2 36, MPAM 40, AMU 44, DIT 48, RME 52, CSV2 56, CSV3 60,
        ],
    ),
    // ID_AA64PFR1_EL1
    (
        0xc021,
        fields![
            BT 0, SSBS 4, MTE 8, RAS_frac 12, MPAM_frac 16, SME 24, RNDR_trap 28, CSV2_frac 32,
            NMI 36, MTE_frac 40 = Signed, GCS 44, THE 48, MTEX 52, DF2 56, PFAR 60,
        ],
    ),
    // ID_AA64ZFR0_EL1
    (
        0xc024,
        fields![
            SVEver 0, AES 4, EltPerm 12, BitPerm 16, BF16 20, B16B16 24, SHA3 32, SM4 40, I8MM 44,
            F16MM 48, F32MM 52, F64MM 56,
        ],
    ),
    // ID_AA64SMFR0_EL1
    (
        0xc025,
        fields![
            SMOP4 0:1, STMOP 16:1, SFEXPA 23:1, AES 24:1, SBitPerm 25:1, SF8DP2 28:1, SF8DP4 29:1,
            SF8FMA 30:1, F32F32 32:1, BI32I32 33:1, B16F32 34:1, F16F32 35:1, I8I32 36, F8F32 40:1,
            F8F16 41:1, F16F16 42:1, B16B16 43:1, I16I32 44, F64F64 48:1, I16I64 52, SMEver 56,
            LUTv2 60:1, FA64 63:1,
        ],
    ),
    // ID_AA64DFR0_EL1. PMUVer is 0xf where the counters are not of the architecture.
    (
        0xc028,
        fields![
            DebugVer 0, TraceVer 4, PMUVer 8 = Signed, BRPs 12, PMSS 16, WRPs 20, SEBEP 24,
            CTX_CMPs 28, PMSVer 32, DoubleLock 36 = Signed, TraceFilt 40, TraceBuffer 44,
            MTPMU 48 = Signed, BRBE 52, ExtTrcBuff 56, HPMN0 60,
        ],
    ),
    // ID_AA64DFR1_EL1
    (
        0xc029,
        fields![
            SYSPMUID 0:8 = Exact, BRPs 8:8, WRPs 16:8, CTX_CMPs 24:8, SPMU 32, PMICNTR 36, ABLE 40,
            ITE 44, EBEP 48, DPFZS 52 = Exact, ABL_CMPs 56:8,
        ],
    ),
    // ID_AA64ISAR0_EL1
    (
        0xc030,
        fields![
            AES 4, SHA1 8, SHA2 12, CRC32 16, Atomic 20, TME 24, RDM 28, SHA3 32, SM3 36, SM4 40,
            DP 44, FHM 48, TS 52, TLB 56, RNDR 60,
        ],
    ),
    // ID_AA64ISAR1_EL1
    (
        0xc031,
        fields![
            DPB 0, APA 4 = Exact, API 8 = Exact, JSCVT 12, FCMA 16, LRCPC 20, GPA 24 = Exact,
            GPI 28 = Exact, FRINTTS 32, SB 36, SPECRES 40, BF16 44, DGH 48, I8MM 52, XS 56, LS64 60,
        ],
    ),
    // ID_AA64MMFR0_EL1
    (
        0xc038,
        fields![
            PARange 0, ASIDBits 4, BigEnd 8, SNSMem 12, BigEndEL0 16, TGran16 20,
            TGran64 24 = Signed, TGran4 28 = Signed, TGran16_2 32 = Machine, TGran64_2 36 = Machine,
            TGran4_2 40 = Machine, ExS 44, FGT 56, ECV 60,
        ],
    ),
    // ID_AA64MMFR1_EL1
    (
        0xc039,
        fields![
            HAFDBS 0, VMIDBits 4, VH 8, HPDS 12, LO 16, PAN 20, SpecSEI 24 = Exact, XNX 28, TWED 32,
            ETS 36, HCX 40, AFP 44, nTLBPA 48, TIDCP1 52, CMOW 56, ECBHB 60,
        ],
    ),
    // ID_AA64MMFR2_EL1
    (
        0xc03a,
        fields![
            CnP 0, UAO 4, LSM 8, IESB 12, VARange 16, CCIDX 20, NV 24, ST 28, AT 32, IDS 36, FWB 40,
            TTL 48, BBM 52, EVT 56, E0PD 60,
        ],
    ),
];
