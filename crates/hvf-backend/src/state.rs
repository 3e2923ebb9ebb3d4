//! What a vCPU and an interrupt controller hold, as data.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The state of one vCPU: what a new one must be given so that the guest goes on as if nothing had happened.
///
/// Captured from a vCPU that is not running, restored into one that has never run. In between it is data, for any serde format, on any
/// machine. The number of the format stands first, so that state of another format is an error and not misread.
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
#[non_exhaustive]
pub struct VcpuState {
    format: FormatVersion<1>,
    /// X0 to X30.
    pub x: [u64; 31],
    /// The program counter.
    pub pc: u64,
    /// PSTATE: the exception level, the interrupt masks, the condition flags.
    pub cpsr: u64,
    /// The control register of floating point.
    pub fpcr: u64,
    /// The status register of floating point.
    pub fpsr: u64,
    /// Q0 to Q31: vector and floating-point registers, the lowest lane in the lowest bits.
    pub q: [u128; 32],
    /// System registers, each in the place in which it is written.
    pub system: Vec<SystemRegister>,
    /// The interrupt controller's registers of this CPU (`ICC_*_EL1`); empty where the framework has no controller in this machine.
    pub gic_cpu: Vec<SystemRegister>,
    /// The virtual timer beside its registers, which are in [`system`](Self::system).
    pub vtimer: VirtualTimer,
    /// An IRQ was to be injected when the vCPU runs next.
    pub pending_irq: bool,
    /// An FIQ was to be injected when the vCPU runs next.
    pub pending_fiq: bool,
    /// Debug exceptions of the guest leave it.
    pub trap_debug_exceptions: bool,
    /// Accesses of the guest to its debug registers leave it.
    pub trap_debug_reg_accesses: bool,
}

/// A system register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SystemRegister {
    /// Which.
    pub register: Encoding,
    /// Its value.
    pub value: u64,
}

/// A system register by its encoding: op0, op1, CRn, CRm and op2, from bit 14 down, as in an `MRS` instruction and in `hv_sys_reg_t`.
///
/// # Examples
/// ```
/// let sctlr_el1 = hvf_backend::Encoding(0xc080);
/// assert_eq!(sctlr_el1.to_string(), "S3_0_C1_C0_0"); // as assemblers take it
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Encoding(pub u16);

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = |from: u32, bits: u32| self.0 >> from & ((1 << bits) - 1);
        let (op0, op1, crn, crm, op2) = (
            field(14, 2),
            field(11, 3),
            field(7, 4),
            field(3, 4),
            field(0, 3),
        );
        write!(f, "S{op0}_{op1}_C{crn}_C{crm}_{op2}")
    }
}

/// What belongs to the virtual timer and is no register of the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VirtualTimer {
    /// What CNTVCT_EL0 counted when the state was captured, in ticks of 1/24,000,000 s on every Mac so far (CNTFRQ_EL0).
    ///
    /// The counter, not the offset from the host's: that would mean nothing after the host was started anew, or on another one.
    pub counter: u64,
    /// The timer has fired and is masked until the monitor has injected the interrupt and unmasks it.
    pub masked: bool,
}

/// The state of the framework's interrupt controller but for [each CPU's registers](VcpuState::gic_cpu).
///
/// The bytes are the framework's own, and only the framework can read them. A later macOS may refuse them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicState {
    format: FormatVersion<1>,
    data: Vec<u8>,
}

impl GicState {
    /// Names bytes that the framework gave (`hv_gic_state_get_data`).
    #[must_use]
    pub fn new(data: Vec<u8>) -> Self {
        let format = FormatVersion;
        Self { format, data }
    }

    /// The framework's bytes.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// The number of a serialised format: any other than `N` is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
struct FormatVersion<const N: u16>;

impl<const N: u16> From<FormatVersion<N>> for u16 {
    fn from(_: FormatVersion<N>) -> Self {
        N
    }
}

impl<const N: u16> TryFrom<u16> for FormatVersion<N> {
    type Error = OtherFormat;

    fn try_from(found: u16) -> Result<Self, OtherFormat> {
        if found == N {
            return Ok(Self);
        }
        Err(OtherFormat { found, known: N })
    }
}

#[derive(Debug, Error)]
#[error("state in format {found}: this version of hvf-backend reads format {known}")]
struct OtherFormat {
    found: u16,
    known: u16,
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use super::*;

    fn every_field_set() -> VcpuState {
        let mut n = 0;
        let mut next = || {
            n += 1;
            n
        };
        let register = |value: u64| SystemRegister {
            register: Encoding(0xc080),
            value,
        };
        VcpuState {
            format: FormatVersion,
            x: std::array::from_fn(|_| next()),
            pc: next(),
            cpsr: next(),
            fpcr: next(),
            fpsr: next(),
            q: std::array::from_fn(|_| u128::from(next()) << 64 | u128::from(next())),
            system: vec![register(next()), register(u64::MAX)],
            gic_cpu: vec![register(next())],
            vtimer: VirtualTimer {
                counter: next(),
                masked: true,
            },
            pending_irq: true,
            pending_fiq: false,
            trap_debug_exceptions: true,
            trap_debug_reg_accesses: false,
        }
    }

    #[test]
    fn state_comes_back_from_binary_and_readable_formats_as_it_was() {
        let state = every_field_set();
        let binary = postcard::to_stdvec(&state).unwrap();
        assert_eq!(postcard::from_bytes::<VcpuState>(&binary).unwrap(), state);
        let readable = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<VcpuState>(&readable).unwrap(), state);

        let gic = GicState::new(vec![1, 2, 3]);
        let binary = postcard::to_stdvec(&gic).unwrap();
        assert_eq!(postcard::from_bytes::<GicState>(&binary).unwrap(), gic);
    }

    #[test]
    fn files_of_format_1_stay_readable() {
        let binary = include_bytes!("../tests/formats/vcpu-state-1.postcard");
        assert_eq!(
            postcard::from_bytes::<VcpuState>(binary).unwrap(),
            every_field_set()
        );
        let readable = include_str!("../tests/formats/vcpu-state-1.json");
        assert_eq!(
            serde_json::from_str::<VcpuState>(readable).unwrap(),
            every_field_set()
        );
    }

    #[test]
    fn state_of_another_format_is_an_error_that_says_so() {
        // The format stands first.
        let state = serde_json::to_string(&every_field_set()).unwrap();
        let later = state.replacen("\"format\":1", "\"format\":2", 1);
        let error = serde_json::from_str::<VcpuState>(&later).unwrap_err();
        assert!(error.to_string().contains("state in format 2"), "{error}");
    }
}
