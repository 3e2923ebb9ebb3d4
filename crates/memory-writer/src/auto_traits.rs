//! Checks at compile time which public types threads may send and share.

use crate::{
    MemoryWriter, MemoryWriterOptions, OpenFileError, PackedStream, PackedStreamOptions, Seal,
    SnapshotError,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<MemoryWriter>();
    shared::<MemoryWriterOptions>();
    shared::<OpenFileError>();
    shared::<PackedStream<Vec<u8>>>();
    shared::<PackedStreamOptions>();
    shared::<Seal>();
    shared::<SnapshotError>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::atomic_file::AtomicWriter>();
    shared::<crate::dirty_bitmap::DirtyBitmap>();
    shared::<crate::page_reader::LayoutError>();
    shared::<crate::sparse_file::PagesUnknown>();
}
