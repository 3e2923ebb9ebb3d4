//! Checks at compile time which public types threads may send and share.

use crate::{BitmapMismatch, GuestRam, GuestRamError, GuestRamOptions, Mapping, TrackedRam};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<BitmapMismatch>();
    shared::<GuestRam>();
    shared::<GuestRamError>();
    shared::<GuestRamOptions>();
    shared::<Mapping>();
    shared::<TrackedRam>();
}

/// An owner may be a trait object.
#[test]
fn owner_is_dyn_compatible_and_shared() {
    shared::<std::sync::Arc<dyn crate::RamOwner>>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::dirty_bitmap::DirtyBitmap>();
    shared::<crate::page_reader::RamLayout>();
}
