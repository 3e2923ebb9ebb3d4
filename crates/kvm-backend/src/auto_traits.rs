//! Checks at compile time which public types threads may send and share.

use crate::{
    DirtyLog, DirtyLogOptions, GuestRam, GuestRamOptions, HarvestError, LogEpochError, Paused,
    PausedHarvest, Precopied, Precopy, PrecopyError, RamSlots, SlotError, StartError, Vcpu, Vcpus,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<DirtyLog>();
    shared::<GuestRam>();
    shared::<GuestRamOptions>();
    shared::<HarvestError>();
    shared::<LogEpochError>();
    shared::<Paused>();
    shared::<PausedHarvest>();
    shared::<Precopied<()>>();
    shared::<Precopy<'_>>();
    shared::<PrecopyError>();
    shared::<DirtyLogOptions>();
    shared::<RamSlots>();
    shared::<SlotError>();
    shared::<StartError>();
    shared::<Vcpu>();
    shared::<Vcpus>();
}

#[cfg(target_arch = "x86_64")]
#[test]
fn states_are_send_and_sync() {
    shared::<crate::MsrList>();
    shared::<crate::StateError>();
    shared::<crate::VcpuState>();
    shared::<crate::VmState>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::dirty_bitmap::DirtyBitmap>();
    shared::<crate::guest_ram::GuestRamError>();
    shared::<crate::kvm_bindings::kvm_regs>();
    shared::<crate::kvm_ioctls::VmFd>();
    shared::<crate::page_reader::RamLayout>();
}
