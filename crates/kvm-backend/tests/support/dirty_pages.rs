//! The pages in a dirty log.

use std::collections::BTreeSet;
use std::sync::Arc;

use dirty_bitmap::{BeginEpochError, DirtyBitmap, LoggedBitmap, LoggedEpoch};
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
    drop(drain(marks));
    log.harvest_live().unwrap();
    drain(marks)
}

/// Takes the marks of the bitmap without a harvest, which a VMM must not do.
pub fn drain(marks: &Arc<LoggedBitmap>) -> DirtyBitmap {
    let harvest = |_: &_| Ok::<_, BeginEpochError>(());
    let epoch = LoggedEpoch::begin_after(Arc::clone(marks), harvest).unwrap();
    let taken = epoch.bitmap();
    let copy = DirtyBitmap::new(taken.ram_start(), taken.ram_size(), taken.page_size()).unwrap();
    copy.mark_all(taken).unwrap();
    epoch.release().unwrap();
    copy
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
