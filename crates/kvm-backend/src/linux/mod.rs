//! Everything: KVM exists on Linux only.

mod dirty_log;
mod open;
mod ram;
mod slots;
mod sys;
mod vcpus;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use dirty_log::{DirtyLog, Harvest, HarvestError, PausedHarvest, Reprotect, StartError};
pub use open::{OpenKvmError, create_vm, open_kvm, open_kvm_at};
pub use ram::{BitmapMismatch, GuestRam, GuestRamError, GuestRamOptions};
pub use slots::{RamSlots, SlotError};
pub use vcpus::{PauseError, Paused, Vcpu, Vcpus};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    CaptureError, IrqChip, Msr, RestoreError, Restored, VcpuState, VmState, VmStateError, long_mode,
};
