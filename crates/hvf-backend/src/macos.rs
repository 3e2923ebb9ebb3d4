//! The modules that use the framework, on macOS on Apple silicon.

mod error;
#[cfg(feature = "macos-15")]
mod gic;
#[cfg(feature = "macos-15")]
mod gic_cpu;
#[cfg(not(feature = "macos-15"))]
#[path = "macos/no_gic_cpu.rs"]
mod gic_cpu;
mod ram;
mod registers;
mod stage2;
mod sys;
mod vcpu;
mod vcpu_state;
mod vm;

/// A general register, PC, PSTATE, FPCR or FPSR.
pub use applevisor_sys::hv_reg_t as Register;
/// A system register.
pub use applevisor_sys::hv_sys_reg_t as SysReg;
pub use error::HvError;
#[cfg(feature = "macos-15")]
pub use gic::{GicError, GicPlace};
pub use ram::{GuestRam, GuestRamError};
pub use stage2::{MapError, ProtectError, Stage2};
pub use vcpu::{Canceller, Vcpu};
pub use vcpu_state::{CaptureError, RestoreError, Restored};
pub use vm::{CreateVmError, PAGE_SIZE, Vm, VmOptions, has_hypervisor};
