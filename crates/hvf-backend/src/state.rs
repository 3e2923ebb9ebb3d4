//! The state of a vCPU and of an interrupt controller, as data.

mod physical_timer;

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use physical_timer::PhysicalTimer;

/// The state of one vCPU, with which a new vCPU resumes the guest.
///
/// The state is captured from a vCPU that is not running, and restored into a vCPU that has never
/// run. It can be serialized in any serde format, on any machine. The first field is the number of
/// the format, so state of another format is an error instead of being misread.
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
#[must_use = "the state is lost unless it is saved"]
pub struct VcpuState {
    format: FormatVersion<1>,
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
}

/// A system register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SystemRegister {
    /// The register.
    pub register: Encoding,
    /// Its value.
    pub value: u64,
}

/// The encoding of a system register, as in an `MRS` instruction and in `hv_sys_reg_t`.
///
/// It consists of op0, op1, CRn, CRm and op2, with op0 in the highest bits, from bit 14 on.
///
/// # Examples
/// ```
/// let sctlr_el1 = hvf_backend::Encoding(0xc080);
/// assert_eq!(sctlr_el1.to_string(), "S3_0_C1_C0_0"); // the syntax of assemblers
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
            creation_index: Some(3),
            physical_timer: Some(PhysicalTimer {
                control: 1,
                fires_in: -5,
            }),
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
    fn files_of_format_1_are_readable() {
        let binary = include_bytes!("../tests/golden/vcpu-state-1.postcard");
        assert_eq!(
            postcard::from_bytes::<VcpuState>(binary).unwrap(),
            every_field_set()
        );
        let text = include_str!("../tests/golden/vcpu-state-1.json");
        assert_eq!(
            serde_json::from_str::<VcpuState>(text).unwrap(),
            every_field_set()
        );
    }

    #[test]
    fn state_of_another_format_is_an_error() {
        let state = serde_json::to_string(&every_field_set()).unwrap();
        let later = state.replacen("\"format\":1", "\"format\":2", 1);
        let error = serde_json::from_str::<VcpuState>(&later).unwrap_err();
        assert!(
            error.to_string().contains("the state has format 2"),
            "{error}"
        );
    }
}
