//! Everything: KVM exists on Linux only.

mod complete_io;
mod dirty_log;
mod open;
mod ram;
mod slots;
mod sys;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use complete_io::complete_io;
pub use dirty_log::{DirtyLog, Harvest, HarvestError, Reprotect, StartError};
pub use open::{OpenKvmError, create_vm, open_kvm, open_kvm_at};
pub use ram::{BitmapMismatch, GuestRam, GuestRamError, GuestRamOptions};
pub use slots::{RamSlots, SlotError};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{
    CaptureError, IrqChip, Msr, RestoreError, Restored, VcpuState, VmState, VmStateError, long_mode,
};
