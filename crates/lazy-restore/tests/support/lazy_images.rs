//! Images for lazily filled memory.

use lazy_restore::{LazyError, LazyRam, LazyRamOptions, UserfaultfdError};
use test_images::Images;

pub const PAGE: u64 = 4096;

pub const MIB: u64 = 1 << 20;

/// A base with a hole, and a diff: 4 MiB.
pub fn images() -> Images {
    Images::new(4 * MIB, PAGE)
        .with([0..500, 600..1024])
        .with((0..100).map(|i| 10 * i..10 * i + 1))
}

pub fn on_demand() -> LazyRamOptions {
    LazyRam::options().prefetch(false)
}

pub fn bytes(images: &Images, page: u64) -> &[u8] {
    &images.ram[(page * PAGE) as usize..][..PAGE as usize]
}

pub fn userfaultfd_error(error: LazyError) -> UserfaultfdError {
    match error {
        LazyError::Userfaultfd(error) => error,
        other => panic!("{other:?}"),
    }
}
