//! The modules that use the framework, on macOS on Apple silicon.

mod adopt;
mod create_error;
mod create_vcpu;
mod errors;
#[cfg(not(feature = "macos-26"))]
mod fewer_features;
#[cfg(feature = "macos-15")]
mod gic;
#[cfg(feature = "macos-15")]
mod gic_cpu;
#[cfg(not(feature = "macos-15"))]
#[path = "macos/no_gic_cpu.rs"]
mod gic_cpu;
#[cfg(feature = "macos-15")]
mod gic_interrupts;
#[cfg(feature = "macos-15")]
mod gic_place;
mod machine;
mod newer;
mod numbers;
mod pause;
mod registers;
mod sme;
mod stage2;
mod start;
mod sys;
mod vcpu;
mod vcpu_features;
mod vcpu_set;
mod vcpu_state;
#[cfg(feature = "macos-15")]
mod vcpu_turns;
mod vm;

pub use adopt::{AdoptVcpuError, AdoptedVcpu};
/// A general register, PC, PSTATE, FPCR or FPSR.
pub use applevisor_sys::hv_reg_t as Register;
/// A system register.
pub use applevisor_sys::hv_sys_reg_t as SysReg;
pub use create_error::CreateVmError;
pub use create_vcpu::CreateVcpuError;
pub use errors::{CaptureError, HvError, RestoreError};
#[cfg(feature = "macos-15")]
pub use gic::GicError;
#[cfg(feature = "macos-15")]
pub use gic_place::{GicPlace, GicSizes, GicSizesError, MsiRegion};
pub use newer::UnsupportedFunction;
pub use pause::Paused;
pub use stage2::{MapError, ProtectError, Stage2};
pub use start::StartError;
pub use vcpu::{Canceller, Vcpu};
pub use vcpu_state::Restored;
#[cfg(feature = "macos-15")]
pub use vcpu_turns::{RestoreVcpuError, VcpuTurn, VcpuTurnsError};
pub use vm::{PAGE_SIZE, Vm, VmOptions, has_hypervisor};
