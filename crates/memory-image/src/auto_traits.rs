//! Checks at compile time which public types threads may send and share.

use crate::{
    Chain, ChainError, HostRam, Image, ImageOptions, MapError, MappedChain, MappedChainOptions,
    MappedImage, MergeError, OpenImageError, ReadImageError, RestoreError, TargetMemory,
    VerifyError, VerifyReport,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<Chain>();
    shared::<ChainError>();
    #[cfg(feature = "vm-memory")]
    shared::<crate::GuestMemoryTarget<std::sync::Arc<crate::vm_memory::GuestMemoryMmap>>>();
    shared::<HostRam<'_>>();
    shared::<Image>();
    shared::<ImageOptions>();
    shared::<MapError>();
    shared::<MappedChain>();
    shared::<MappedChainOptions>();
    shared::<MappedImage>();
    shared::<MergeError>();
    shared::<OpenImageError>();
    shared::<ReadImageError>();
    shared::<RestoreError>();
    shared::<TargetMemory<'_>>();
    shared::<crate::VerifiedChain>();
    shared::<VerifyError>();
    shared::<VerifyReport>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::dirty_bitmap::DirtyBitmap>();
    shared::<crate::guest_ram::GuestRam>();
    shared::<crate::memory_writer::MemoryWriter>();
    shared::<crate::page_reader::LayoutError>();
    shared::<crate::sparse_file::PagesUnknown>();
}
