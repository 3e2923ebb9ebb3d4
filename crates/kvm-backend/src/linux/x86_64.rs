//! The x86-64 part: the state of vCPUs and of the virtual machine, and 64-bit programs without
//! firmware.

mod abi;
pub(crate) mod bytes;
pub(crate) mod capture;
pub mod long_mode;
pub(crate) mod msrs;
pub(crate) mod restore;
pub(crate) mod vcpu_state;
pub(crate) mod vm_state;
mod xsave;
