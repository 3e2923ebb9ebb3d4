//! Checks at compile time which public types threads may send and share.

use crate::{
    FileReader, Layered, LayeredError, LayoutError, MappedMemory, OutsideRam, RamLayout, Touched,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<FileReader>();
    shared::<Layered<Vec<u8>>>();
    shared::<LayeredError>();
    shared::<LayoutError>();
    shared::<MappedMemory>();
    shared::<OutsideRam>();
    shared::<RamLayout>();
    shared::<Touched<'_, [u8]>>();
}

#[test]
#[cfg(feature = "vm-memory")]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::vm_memory::GuestAddress>();
}
