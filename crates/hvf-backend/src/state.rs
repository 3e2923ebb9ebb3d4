//! The state of a vCPU and of an interrupt controller, as data.
mod bytes;
mod physical_timer;
mod stored;

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::register_names;

pub use bytes::StateError;
pub use physical_timer::PhysicalTimer;

/// The state of one vCPU, with which a new vCPU resumes the guest.
///
/// The state is captured from a vCPU that is not running, and restored into a vCPU that has never
/// run. It is stored as [bytes](Self::to_bytes) or in any serde format, on any machine. The first
/// field is the number of the format, so state of another format is an error instead of being
/// misread. System registers are serialized by their names.
///
/// # Examples
/// ```
/// use hvf_backend::VcpuState;
///
/// let mut state = VcpuState::default();
/// state.pc = 0x8000_0000;
/// let bytes = postcard::to_stdvec(&state)?;
/// assert_eq!(postcard::from_bytes::<VcpuState>(&bytes)?, state);
/// # Ok::<(), postcard::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "stored::VcpuState", into = "stored::VcpuState")]
#[non_exhaustive]
#[must_use = "the state is lost unless it is saved"]
pub struct VcpuState {
    /// X0 to X30.
    pub x: [u64; 31],
    /// The program counter.
    pub pc: u64,
    /// PSTATE: the exception level, the interrupt masks, the condition flags.
    pub cpsr: u64,
    /// The floating-point control register.
    pub fpcr: u64,
    /// The floating-point status register.
    pub fpsr: u64,
    /// Q0 to Q31: vector and floating-point registers, with the lowest lane in the lowest bits.
    pub q: [u128; 32],
    /// System registers, in the order in which they are written.
    pub system: Vec<SystemRegister>,
    /// This CPU's registers of the interrupt controller (`ICC_*_EL1`). Empty if the machine has no
    /// interrupt controller of the framework.
    pub gic_cpu: Vec<SystemRegister>,
    /// The state of the virtual timer except for its registers, which are in
    /// [`system`](Self::system).
    pub vtimer: VirtualTimer,
    /// Whether an IRQ is injected when the vCPU next runs.
    pub pending_irq: bool,
    /// Whether an FIQ is injected when the vCPU next runs.
    pub pending_fiq: bool,
    /// Whether the guest's debug exceptions exit to the VMM.
    pub trap_debug_exceptions: bool,
    /// Whether the guest's accesses to its debug registers exit to the VMM.
    pub trap_debug_reg_accesses: bool,
    /// The number of vCPUs that the machine had created before this one. None if the machine has no
    /// interrupt controller of the framework.
    ///
    /// The interrupt controller has its redistributors in this order, so the state is only restored
    /// into a vCPU with the same number.
    pub creation_index: Option<u32>,
    /// The physical timer. None if the machine has no interrupt controller of the framework.
    pub physical_timer: Option<PhysicalTimer>,
    /// The state of the scalable matrix extension. None if the vCPU does not have it, or if the
    /// guest uses neither streaming mode nor ZA.
    pub sme: Option<SmeState>,
    /// The system registers of a file whose names this version of the crate does not know. They
    /// are kept when the state is serialized again.
    pub(crate) unknown: Vec<UnknownRegister>,
}

/// The state of the scalable matrix extension (SME) of one vCPU (macOS 15.2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SmeState {
    /// The registers of streaming mode, if the vCPU is in it (PSTATE.SM).
    pub streaming: Option<StreamingRegisters>,
    /// The registers ZA and ZT0, if they are in use (PSTATE.ZA).
    pub za: Option<ZaRegisters>,
}

/// The registers of streaming mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamingRegisters {
    /// Z0 to Z31, each of the longest vector length of the CPU.
    pub z: Vec<Vec<u8>>,
    /// P0 to P15, each of an eighth of that length.
    pub p: Vec<Vec<u8>>,
}

/// The registers ZA and ZT0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZaRegisters {
    /// ZA, of the square of the longest vector length.
    pub za: Vec<u8>,
    /// ZT0, 64 bytes.
    pub zt0: Vec<u8>,
}

/// A system register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SystemRegister {
    /// The register.
    pub register: Encoding,
    /// Its value.
    pub value: u64,
}

/// A system register that this version of the crate does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnknownRegister {
    pub(crate) name: String,
    value: u64,
}

/// The encoding of a system register, as in an `MRS` instruction and in `hv_sys_reg_t`.
///
/// It consists of op0, op1, CRn, CRm and op2, with op0 in the highest bits, from bit 14 on. It is
/// displayed and serialized as the name of the register in the Arm ARM, or in the syntax of
/// assemblers if this crate does not know the name.
///
/// # Examples
/// ```
/// use hvf_backend::Encoding;
///
/// assert_eq!(Encoding(0xc080).to_string(), "SCTLR_EL1");
/// assert_eq!(Encoding(0xffff).to_string(), "S3_7_C15_C15_7");
/// assert_eq!(Encoding::from_name("TPIDR_EL1"), Some(Encoding(0xc684)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Encoding(pub u16);

impl Encoding {
    /// Returns the encoding of the register with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let known = register_names::encoding(name).map(Self);
        known.or_else(|| Self::from_fields(name))
    }

    /// Reads the syntax of assemblers.
    fn from_fields(name: &str) -> Option<Self> {
        let (op0, rest) = name.strip_prefix('S')?.split_once('_')?;
        let (op1, rest) = rest.split_once("_C")?;
        let (crn, rest) = rest.split_once("_C")?;
        let (crm, op2) = rest.split_once('_')?;
        let fields = [(op0, 14), (op1, 11), (crn, 7), (crm, 3), (op2, 0)];
        let mut encoding = 0;
        for (field, from) in fields {
            encoding |= field.parse::<u16>().ok()?.checked_shl(from)?;
        }
        // A field that is too large or written in another way has another text.
        let encoding = Self(encoding);
        (encoding.fields() == name).then_some(encoding)
    }

    fn fields(self) -> String {
        let field = |from: u32, bits: u32| self.0 >> from & ((1 << bits) - 1);
        let (op0, op1, crn) = (field(14, 2), field(11, 3), field(7, 4));
        format!("S{op0}_{op1}_C{crn}_C{}_{}", field(3, 4), field(0, 3))
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match register_names::name(self.0) {
            Some(name) => f.write_str(name),
            None => f.write_str(&self.fields()),
        }
    }
}

impl From<Encoding> for String {
    fn from(encoding: Encoding) -> Self {
        encoding.to_string()
    }
}

impl TryFrom<String> for Encoding {
    type Error = UnknownName;

    fn try_from(name: String) -> Result<Self, UnknownName> {
        Self::from_name(&name).ok_or(UnknownName(name))
    }
}

/// An error for a name of a system register that this version of the crate does not know.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the name of the system register {0:?} is unknown to this version of hvf-backend")]
pub struct UnknownName(String);

/// The state of a virtual timer that is not in a register of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VirtualTimer {
    /// The value of CNTVCT_EL0 when the state was captured. On all Macs so far, a tick is
    /// 1/24,000,000 s (CNTFRQ_EL0).
    ///
    /// This is the counter and not its offset from the host's counter. The offset would be invalid
    /// after a restart of the host, or on another host.
    pub counter: u64,
    /// Whether the timer is masked. It is masked when it fires, until the VMM has injected the
    /// interrupt and unmasks it.
    pub masked: bool,
}

/// The state of the framework's interrupt controller, except for [each CPU's
/// registers](VcpuState::gic_cpu).
///
/// The bytes have the private format of the framework. A later version of macOS may refuse them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "the state is lost unless it is saved"]
pub struct GicState {
    format: FormatVersion<1>,
    data: Vec<u8>,
}

impl GicState {
    /// Creates a state from the bytes that the framework returned (`hv_gic_state_get_data`).
    pub fn new(data: Vec<u8>) -> Self {
        let format = FormatVersion;
        Self { format, data }
    }

    /// Returns the bytes of the framework.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// The number of a serialized format. Deserializing a number other than `N` is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
struct FormatVersion<const N: u16>;

impl<const N: u16> From<FormatVersion<N>> for u16 {
    fn from(_: FormatVersion<N>) -> Self {
        N
    }
}

impl<const N: u16> TryFrom<u16> for FormatVersion<N> {
    type Error = UnsupportedFormat;

    fn try_from(found: u16) -> Result<Self, UnsupportedFormat> {
        if found == N {
            return Ok(Self);
        }
        Err(UnsupportedFormat { found, known: N })
    }
}

#[derive(Debug, Error)]
#[error(
    "the state has format {found}, but this version of hvf-backend reads format {known}: use the \
     version that wrote it"
)]
struct UnsupportedFormat {
    found: u16,
    known: u16,
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    fn every_field_set() -> VcpuState {
        let mut n = 0;
        let mut next = || {
            n += 1;
            n
        };
        let register = |encoding, value: u64| SystemRegister {
            register: Encoding(encoding),
            value,
        };
        VcpuState {
            x: std::array::from_fn(|_| next()),
            pc: next(),
            cpsr: next(),
            fpcr: next(),
            fpsr: next(),
            q: std::array::from_fn(|_| u128::from(next()) << 64 | u128::from(next())),
            system: vec![
                register(0xc080, next()),
                register(0xc684, u64::MAX),
                register(0xffff, 1),
            ],
            gic_cpu: vec![register(0xc230, next())],
            vtimer: VirtualTimer {
                counter: next(),
                masked: true,
            },
            pending_irq: true,
            pending_fiq: false,
            trap_debug_exceptions: true,
            trap_debug_reg_accesses: false,
            creation_index: Some(3),
            physical_timer: Some(PhysicalTimer {
                control: 1,
                fires_in: -5,
            }),
            sme: Some(SmeState {
                streaming: Some(StreamingRegisters {
                    z: vec![vec![1, 2, 3, 4]],
                    p: vec![vec![5]],
                }),
                za: Some(ZaRegisters {
                    za: vec![6, 7],
                    zt0: vec![8; 3],
                }),
            }),
            unknown: vec![UnknownRegister {
                name: "NEW_EL1".to_owned(),
                value: 9,
            }],
        }
    }

    #[test]
    fn state_round_trips_through_binary_and_text_formats() {
        let state = every_field_set();
        let binary = postcard::to_stdvec(&state).unwrap();
        assert_eq!(postcard::from_bytes::<VcpuState>(&binary).unwrap(), state);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<VcpuState>(&text).unwrap(), state);

        let gic = GicState::new(vec![1, 2, 3]);
        let binary = postcard::to_stdvec(&gic).unwrap();
        assert_eq!(postcard::from_bytes::<GicState>(&binary).unwrap(), gic);
    }

    #[test]
    fn files_of_format_2_are_readable() {
        let binary = include_bytes!("../tests/golden/vcpu-state-2.postcard");
        assert_eq!(
            postcard::from_bytes::<VcpuState>(binary).unwrap(),
            every_field_set()
        );
        let text = include_str!("../tests/golden/vcpu-state-2.json");
        assert_eq!(
            serde_json::from_str::<VcpuState>(text).unwrap(),
            every_field_set()
        );
        let written = serde_json::to_string_pretty(&every_field_set()).unwrap();
        assert_eq!(written + "\n", text);
    }

    #[test]
    fn state_of_another_format_is_an_error() {
        let state = serde_json::to_string(&every_field_set()).unwrap();
        let later = state.replacen("\"format\":2", "\"format\":3", 1);
        let error = serde_json::from_str::<VcpuState>(&later).unwrap_err();
        assert!(
            error.to_string().contains("the state has format 3"),
            "{error}"
        );
    }

    #[test]
    fn registers_are_stored_by_name() {
        let state = serde_json::to_string(&every_field_set()).unwrap();
        // The last name is one that this version does not know. It is kept.
        for name in ["TPIDR_EL1", "S3_7_C15_C15_7", "ICC_PMR_EL1", "NEW_EL1"] {
            let stored = format!("{{\"register\":\"{name}\",\"value\":");
            assert!(state.contains(&stored), "{name}: {state}");
        }
    }

    #[test]
    fn every_encoding_is_read_from_its_text() {
        for number in 0..=u16::MAX {
            let encoding = Encoding(number);
            assert_eq!(Encoding::from_name(&encoding.to_string()), Some(encoding));
        }
        for text in [
            "",
            "S",
            "S3_0",
            "S3_0_C1_C0_8",
            "S3_0_C01_C0_0",
            "S4_0_C1_C0_0",
            "tpidr_el1",
        ] {
            assert_eq!(Encoding::from_name(text), None, "{text}");
        }
    }
}
