//! Checks at compile time which public types threads may send and share.

use crate::{
    LazyError, LazyRam, LazyRamOptions, PageServer, PageServerOptions, RamSegment, RamSource,
    RefusedClient, ServeError, ServedVm, SizedReader, WaitError, WorkingSet, WorkingSetError,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<LazyError>();
    shared::<LazyRam>();
    shared::<LazyRamOptions>();
    shared::<PageServer>();
    shared::<PageServerOptions>();
    shared::<RamSegment>();
    shared::<Box<dyn RamSource>>();
    shared::<RefusedClient>();
    shared::<ServeError>();
    shared::<ServedVm>();
    shared::<SizedReader<Vec<u8>>>();
    shared::<WaitError>();
    shared::<WorkingSet>();
    shared::<WorkingSetError>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::atomic_file::CommitError>();
    shared::<crate::guest_ram::GuestRam>();
    shared::<crate::memory_image::Chain>();
    shared::<crate::page_reader::MappingsError>();
    shared::<crate::uffd::AdoptError>();
}
