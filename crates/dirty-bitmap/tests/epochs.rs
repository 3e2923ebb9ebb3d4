//! Marks that are out for a save come back unless it succeeded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dirty_bitmap::{BeginEpochError, DirtyBitmap, Epoch, TakeMoreError};

fn marked() -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
    bitmap.set_range(0x3000, 0x9000).unwrap();
    bitmap
}

fn runs<K>(bitmap: &DirtyBitmap<K>) -> Vec<std::ops::Range<u64>> {
    bitmap.runs().collect()
}

#[test]
fn a_released_epoch_forgets_its_marks() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    assert!(bitmap.is_clean());
    assert_eq!(runs(epoch.bitmap()), [0x3000..0xc000]);
    epoch.release().unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn a_dropped_epoch_gives_its_marks_back_beside_newer_ones() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.set_dirty(0xc000).unwrap();
    drop(epoch);
    assert_eq!(runs(&bitmap), [0x3000..0xd000]);
}

#[test]
fn a_panic_in_a_save_gives_the_marks_back() {
    let bitmap = marked();
    let save = || {
        let _epoch = bitmap.begin_epoch().unwrap();
        panic!("the disk is on fire");
    };
    catch_unwind(AssertUnwindSafe(save)).unwrap_err();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
    bitmap.begin_epoch().unwrap().release().unwrap();
}

#[test]
fn marks_come_back_in_the_granule_the_bitmap_has_by_then() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.rebuild(65536).unwrap();
    drop(epoch);
    assert_eq!(runs(&bitmap), [0..65536]);
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.rebuild(4096).unwrap();
    drop(epoch);
    assert_eq!(
        runs(&bitmap),
        [0..65536],
        "the epoch knew no better than its coarse pages"
    );
}

#[test]
fn two_epochs_at_once_are_refused() {
    let bitmap = marked();
    let first = bitmap.begin_epoch().unwrap();
    bitmap.set_dirty(0).unwrap();
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    assert_eq!(runs(&bitmap), [0..4096], "a refused epoch takes nothing");
    drop(first);
    bitmap.begin_epoch().unwrap().release().unwrap();
}

#[test]
fn what_is_dirtied_during_a_save_joins_its_epoch() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    bitmap.set_dirty(0xf000).unwrap();
    assert_eq!(runs(epoch.take_more().unwrap()), [0xf000..0x10000]);
    assert_eq!(runs(epoch.bitmap()), [0x3000..0xc000, 0xf000..0x10000]);
    assert!(bitmap.is_clean());
    bitmap.rebuild(32768).unwrap();
    bitmap.set_dirty(0x2_0000).unwrap();
    assert_eq!(runs(epoch.take_more().unwrap()), [0x2_0000..0x2_8000]);
    drop(epoch);
    assert_eq!(
        runs(&bitmap),
        [0..0x1_0000, 0x2_0000..0x2_8000],
        "all of it comes back"
    );
}

#[test]
fn an_epoch_of_a_shared_bitmap_moves_to_another_thread() {
    let bitmap = Arc::new(marked());
    let epoch = Epoch::begin(Arc::clone(&bitmap)).unwrap();
    std::thread::spawn(move || drop(epoch)).join().unwrap();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[test]
fn a_leaked_epoch_is_reclaimed_with_all_its_marks() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    bitmap.set_dirty(0xf000).unwrap();
    epoch.take_more().unwrap();
    std::mem::forget(epoch);
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    assert!(bitmap.reclaim_epoch());
    assert_eq!(runs(&bitmap), [0x3000..0xc000, 0xf000..0x10000]);
    assert!(!bitmap.reclaim_epoch(), "there is no second one");
    bitmap.begin_epoch().unwrap().release().unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn a_reclaimed_epoch_can_not_release_its_marks() {
    let bitmap = marked();
    let stuck = bitmap.begin_epoch().unwrap();
    assert!(bitmap.reclaim_epoch());
    let saved = runs(stuck.bitmap());
    assert_eq!(saved, runs(&bitmap), "what it saves stays known");
    let error = stuck.release().unwrap_err();
    assert!(error.to_string().contains("dirty again"), "{error}");
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[test]
fn a_reclaimed_epoch_does_not_end_the_next_one() {
    let bitmap = marked();
    let mut stuck = bitmap.begin_epoch().unwrap();
    bitmap.reclaim_epoch();
    let next = bitmap.begin_epoch().unwrap();
    bitmap.set_dirty(0xf000).unwrap();
    assert!(matches!(
        stuck.take_more(),
        Err(TakeMoreError::Reclaimed(_))
    ));
    assert_eq!(runs(&bitmap), [0xf000..0x10000], "it takes nothing");
    stuck.release().unwrap_err();
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    drop(next);
    assert_eq!(runs(&bitmap), [0x3000..0xc000, 0xf000..0x10000]);

    let stuck = bitmap.begin_epoch().unwrap();
    bitmap.reclaim_epoch();
    let next = bitmap.begin_epoch().unwrap();
    drop(stuck);
    next.release().unwrap();
    assert!(bitmap.is_clean(), "the first one gives nothing back");
}

/// Bitmaps of earlier epochs are used again: of another granule, still looked at, or rebuilt.
#[test]
fn an_epoch_has_no_marks_of_the_ones_before() {
    let bitmap = marked();
    for (round, granule) in [4096, 4096, 16384, 16384, 4096, 512, 4096]
        .into_iter()
        .enumerate()
    {
        bitmap.rebuild(granule).unwrap();
        let page = 0x2_0000 + round as u64 * 0x8000;
        bitmap.begin_epoch().unwrap().release().unwrap();
        bitmap.set_dirty(page).unwrap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        assert_eq!(runs(epoch.bitmap()), [page..page + granule]);
        assert_eq!(epoch.bitmap().granule(), granule);
        bitmap.set_dirty(page + 0x4000).unwrap();
        let more = epoch.take_more().unwrap();
        assert_eq!(runs(more), [page + 0x4000..page + 0x4000 + granule]);
        assert_eq!(runs(epoch.take_more().unwrap()), []);
        if round % 2 == 0 {
            epoch.bitmap().rebuild(granule * 2).unwrap();
        }
        if round % 3 == 0 {
            bitmap.reclaim_epoch();
            epoch.release().unwrap_err();
            bitmap.begin_epoch().unwrap().release().unwrap();
        } else {
            epoch.release().unwrap();
        }
        assert!(bitmap.is_clean());
    }
}
