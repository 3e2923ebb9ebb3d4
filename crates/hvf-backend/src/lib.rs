//! Snapshot guests of Apple's Hypervisor framework: guest RAM as a page source, dirty tracking by stage-2 write protection, vCPU state.

pub mod el1;
mod exit;
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod macos;
mod state;
mod syndrome;
mod tracker;

pub use exit::{Exception, Exit};
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub use macos::*;
pub use state::{Encoding, GicState, SystemRegister, VcpuState, VirtualTimer};
pub use syndrome::Access;
pub use tracker::{Answer, ArmError, FaultError, InGuest, Stage2Tracker, TrackError};
