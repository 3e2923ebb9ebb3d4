//! What is particular to x86-64: processor state, and a processor to start with.

mod abi;
mod capture;
pub mod long_mode;
mod msrs;
mod restore;
mod vcpu_state;
mod vm_state;
mod xsave;

pub use capture::CaptureError;
pub use restore::{RestoreError, Restored};
pub use vcpu_state::{Msr, VcpuState};
pub use vm_state::{IrqChip, VmState, VmStateError};
