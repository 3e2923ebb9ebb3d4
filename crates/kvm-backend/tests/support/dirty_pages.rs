//! The pages in a dirty log.

use std::collections::BTreeSet;

use dirty_bitmap::DirtyBitmap;
use kvm_backend::DirtyLog;

use super::{CODE, Guest, HIGH, HIGH_SIZE, LOW_SIZE, PAGE, TABLES, offset};

/// Addresses that the tests write to, in both regions and at their borders.
pub const TOUCHED: [u64; 7] = [
    0x20000,
    0x21ff8,
    0x100000,
    LOW_SIZE - 8,
    HIGH,
    HIGH + 0x123450,
    HIGH + HIGH_SIZE - 8,
];

/// Takes the contents of the log, without the host's writes.
pub fn logged(guest: &Guest, log: &DirtyLog) -> DirtyBitmap {
    let marks = guest.ram.dirty_bitmap();
    drop(marks.drain().unwrap());
    log.harvest_live().unwrap();
    marks.drain().unwrap()
}

/// Returns the numbers of the marked pages, without those of the page tables, which the processor
/// itself may have written.
pub fn pages<K>(bitmap: &DirtyBitmap<K>) -> BTreeSet<u64> {
    let tables = TABLES / PAGE..CODE / PAGE;
    bitmap
        .runs()
        .flat_map(|run| run.start / PAGE..run.end.div_ceil(PAGE))
        .filter(|page| !tables.contains(page))
        .collect()
}

pub fn pages_of(addresses: &[u64]) -> BTreeSet<u64> {
    addresses.iter().map(|a| offset(*a) / PAGE).collect()
}
