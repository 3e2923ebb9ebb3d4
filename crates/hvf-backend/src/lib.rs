//! Snapshot guests of Apple's Hypervisor framework: guest RAM as a page source, dirty tracking by stage-2 write protection, vCPU state.

mod exit;
mod state;
mod syndrome;
mod tracker;

pub use exit::{Exception, Exit};
pub use state::{Encoding, GicState, SystemRegister, VcpuState, VirtualTimer};
