//! Checks at compile time which public types threads may send and share.

use crate::{Exit, GicState, GuestRam, RunGuard, Stage2TrackerError, VcpuState};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<Exit>();
    shared::<GicState>();
    shared::<GuestRam>();
    shared::<RunGuard>();
    shared::<Stage2TrackerError>();
    shared::<VcpuState>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::dirty_bitmap::TrackedBitmap>();
    shared::<crate::guest_ram::BitmapMismatch>();
    shared::<crate::page_reader::RamLayout>();
}

/// The framework accepts the calls of a vCPU only on the thread that created it.
#[test]
#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
fn types_of_the_framework_are_send_and_sync() {
    shared::<crate::Canceller>();
    shared::<crate::Stage2>();
    shared::<crate::Stage2Tracker<crate::Stage2>>();
    shared::<crate::Vm>();
    shared::<crate::Paused>();
    #[cfg(feature = "macos-15")]
    shared::<crate::VcpuTurn>();
}
