//! Checks at compile time which public types threads may send and share.

use crate::{
    LazyFillError, ProcessMaps, ProcessMemory, ProcessMemoryError, ProcessStopError,
    StoppedProcess, Unexamined,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<LazyFillError>();
    shared::<ProcessMaps>();
    shared::<ProcessMemory>();
    shared::<ProcessMemoryError>();
    shared::<ProcessStopError>();
    shared::<StoppedProcess>();
    shared::<Unexamined>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::page_reader::LayeredError>();
}
