//! Logged bitmaps: marks are taken only after a harvest.

#![cfg(not(ramsnap_loom))]

use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{BeginEpochError, DirtyBitmap, ExtendError, LoggedBitmap, LoggedEpoch};

type AnyError = Box<dyn std::error::Error>;

fn bitmap() -> Arc<LoggedBitmap> {
    Arc::new(LoggedBitmap::logged(0, 1 << 20, 4096).unwrap())
}

fn runs<K>(bitmap: &DirtyBitmap<K>) -> Vec<Range<u64>> {
    bitmap.runs().collect()
}

/// Returns a harvest of a log that has the page at an address.
fn page_at(address: u64) -> impl Fn(&Arc<LoggedBitmap>) -> Result<(), AnyError> {
    move |bitmap| {
        bitmap.mark(address)?;
        Ok(())
    }
}

#[test]
fn epoch_has_the_harvested_pages_and_the_marks_before() {
    let bitmap = bitmap();
    bitmap.mark(0).unwrap(); // by the host
    let mut epoch = LoggedEpoch::begin_after(Arc::clone(&bitmap), page_at(0x3000)).unwrap();
    assert!(bitmap.is_clean());
    assert_eq!(runs(epoch.bitmap()), [0..0x1000, 0x3000..0x4000]);
    bitmap.mark(0x8000).unwrap();
    let extension = epoch.extend_after(page_at(0x5000)).unwrap();
    assert_eq!(runs(&extension), [0x5000..0x6000, 0x8000..0x9000]);
    drop(epoch);
    assert_eq!(bitmap.dirty_pages(), 4);
}

#[test]
fn failed_harvest_takes_no_mark() {
    let bitmap = bitmap();
    let fails = |bitmap: &Arc<LoggedBitmap>| {
        bitmap.mark(0x3000)?;
        Err(AnyError::from("no log"))
    };
    let error = LoggedEpoch::begin_after(Arc::clone(&bitmap), fails).unwrap_err();
    assert_eq!(error.to_string(), "no log");
    assert_eq!(runs(&bitmap), [0x3000..0x4000]);
    let mut epoch = LoggedEpoch::begin_after(Arc::clone(&bitmap), page_at(0)).unwrap();
    epoch.extend_after(fails).unwrap_err();
    assert_eq!(runs(&bitmap), [0x3000..0x4000]);
    epoch.release().unwrap();
    assert_eq!(runs(&bitmap), [0x3000..0x4000]);
}

#[test]
fn second_epoch_is_refused_until_the_first_is_reclaimed() {
    let bitmap = bitmap();
    let begin = || LoggedEpoch::begin_after(Arc::clone(&bitmap), page_at(0x3000));
    let mut stuck = begin().unwrap();
    let error = begin().unwrap_err();
    assert!(matches!(
        error.downcast_ref(),
        Some(BeginEpochError::AlreadyOpen)
    ));
    assert!(bitmap.reclaim_epoch().unwrap());
    let error = stuck.extend_after(page_at(0)).unwrap_err();
    assert!(matches!(
        error.downcast_ref(),
        Some(ExtendError::Reclaimed(_))
    ));
    assert_eq!(runs(begin().unwrap().bitmap()), [0..0x1000, 0x3000..0x4000]);
}
