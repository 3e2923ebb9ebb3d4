//! Epochs: the marks taken by a save are restored unless it succeeded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dirty_bitmap::{
    BeginEpochError, Coverage, DirtyBitmap, Epoch, ExtendError, NotReleased, ReleaseError,
};

fn marked() -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
    bitmap.mark_range(0x3000, 0x9000).unwrap();
    bitmap
}

fn runs<K>(bitmap: &DirtyBitmap<K>) -> Vec<std::ops::Range<u64>> {
    bitmap.runs().collect()
}

#[test]
fn release_discards_the_marks() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    assert!(bitmap.is_clean());
    assert_eq!(runs(epoch.bitmap()), [0x3000..0xc000]);
    epoch.release().unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn drop_restores_the_marks_and_keeps_newer_ones() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.mark(0xc000).unwrap();
    drop(epoch);
    assert_eq!(runs(&bitmap), [0x3000..0xd000]);
}

#[test]
fn a_panic_during_a_save_restores_the_marks() {
    let bitmap = marked();
    let save = || {
        let _epoch = bitmap.begin_epoch().unwrap();
        panic!("the save failed");
    };
    catch_unwind(AssertUnwindSafe(save)).unwrap_err();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
    bitmap.begin_epoch().unwrap().release().unwrap();
}

#[test]
fn marks_are_restored_in_the_current_granule() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.rebuild(65536).unwrap();
    drop(epoch);
    assert_eq!(runs(&bitmap), [0..65536]);
    let epoch = bitmap.begin_epoch().unwrap();
    bitmap.rebuild(4096).unwrap();
    drop(epoch);
    assert_eq!(runs(&bitmap), [0..65536], "the epoch has only coarse pages");
}

#[test]
fn a_second_concurrent_epoch_is_an_error() {
    let bitmap = marked();
    let first = bitmap.begin_epoch().unwrap();
    bitmap.mark(0).unwrap();
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    assert_eq!(runs(&bitmap), [0..4096], "a refused epoch takes nothing");
    drop(first);
    bitmap.begin_epoch().unwrap().release().unwrap();
}

#[test]
fn extending_adds_new_marks_to_the_epoch() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    bitmap.mark(0xf000).unwrap();
    assert_eq!(runs(&epoch.extend().unwrap()), [0xf000..0x10000]);
    assert_eq!(runs(epoch.bitmap()), [0x3000..0xc000, 0xf000..0x10000]);
    assert!(bitmap.is_clean());
    bitmap.rebuild(32768).unwrap();
    bitmap.mark(0x2_0000).unwrap();
    assert_eq!(runs(&epoch.extend().unwrap()), [0x2_0000..0x2_8000]);
    drop(epoch);
    assert_eq!(
        runs(&bitmap),
        [0..0x1_0000, 0x2_0000..0x2_8000],
        "all marks are restored"
    );
}

#[test]
fn an_epoch_of_an_arc_can_move_to_another_thread() {
    let bitmap = Arc::new(marked());
    let epoch = Epoch::begin(Arc::clone(&bitmap)).unwrap();
    std::thread::spawn(move || drop(epoch)).join().unwrap();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[test]
fn reclaim_restores_all_marks_of_a_leaked_epoch() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    bitmap.mark(0xf000).unwrap();
    let _ = epoch.extend().unwrap();
    std::mem::forget(epoch);
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    assert!(bitmap.reclaim_epoch().unwrap());
    assert_eq!(runs(&bitmap), [0x3000..0xc000, 0xf000..0x10000]);
    assert!(!bitmap.reclaim_epoch().unwrap(), "there is no open epoch");
    bitmap.begin_epoch().unwrap().release().unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn a_reclaimed_epoch_cannot_be_released() {
    let bitmap = marked();
    let stuck = bitmap.begin_epoch().unwrap();
    assert!(bitmap.reclaim_epoch().unwrap());
    let saved = runs(stuck.bitmap());
    assert_eq!(saved, runs(&bitmap), "the epoch keeps a copy of its marks");
    let error = stuck.release().unwrap_err();
    assert!(error.to_string().contains("dirty again"), "{error}");
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[test]
fn a_reclaimed_epoch_does_not_affect_the_next_one() {
    let bitmap = marked();
    let mut stuck = bitmap.begin_epoch().unwrap();
    bitmap.reclaim_epoch().unwrap();
    let next = bitmap.begin_epoch().unwrap();
    bitmap.mark(0xf000).unwrap();
    assert!(matches!(stuck.extend(), Err(ExtendError::Reclaimed(_))));
    assert_eq!(
        runs(&bitmap),
        [0xf000..0x10000],
        "a reclaimed epoch takes nothing"
    );
    stuck.release().unwrap_err();
    assert_eq!(
        bitmap.begin_epoch().unwrap_err(),
        BeginEpochError::AlreadyOpen
    );
    drop(next);
    assert_eq!(runs(&bitmap), [0x3000..0xc000, 0xf000..0x10000]);

    let stuck = bitmap.begin_epoch().unwrap();
    bitmap.reclaim_epoch().unwrap();
    let next = bitmap.begin_epoch().unwrap();
    drop(stuck);
    next.release().unwrap();
    assert!(bitmap.is_clean(), "the first epoch restores nothing");
}

/// Epochs reuse the bitmaps of earlier epochs, except those of another granule and those still in
/// use.
#[test]
fn an_epoch_has_no_marks_of_earlier_epochs() {
    let bitmap = marked();
    for (round, granule) in [4096, 4096, 16384, 16384, 4096, 512, 4096]
        .into_iter()
        .enumerate()
    {
        bitmap.rebuild(granule).unwrap();
        let page = 0x2_0000 + round as u64 * 0x8000;
        bitmap.begin_epoch().unwrap().release().unwrap();
        bitmap.mark(page).unwrap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        assert_eq!(runs(epoch.bitmap()), [page..page + granule]);
        assert_eq!(epoch.bitmap().granule(), granule);
        bitmap.mark(page + 0x4000).unwrap();
        let more = epoch.extend().unwrap();
        assert_eq!(runs(&more), [page + 0x4000..page + 0x4000 + granule]);
        assert_eq!(runs(&epoch.extend().unwrap()), []);
        if round % 3 == 0 {
            bitmap.reclaim_epoch().unwrap();
            epoch.release().unwrap_err();
            bitmap.begin_epoch().unwrap().release().unwrap();
        } else {
            epoch.release().unwrap();
        }
        assert!(bitmap.is_clean());
    }
}

#[test]
fn an_epoch_cannot_be_reclaimed_during_its_commit() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    let commit = || {
        let error = bitmap.reclaim_epoch().unwrap_err();
        assert!(error.to_string().contains("wait"), "{error}");
        assert_eq!(
            bitmap.begin_epoch().unwrap_err(),
            BeginEpochError::AlreadyOpen
        );
        Ok::<_, ()>(7)
    };
    assert_eq!(epoch.release_after(commit), Ok(7));
    assert!(bitmap.is_clean());

    let epoch = bitmap.begin_epoch().unwrap();
    assert!(
        bitmap.reclaim_epoch().unwrap(),
        "the next epoch can be reclaimed"
    );
    drop(epoch);
}

#[test]
fn a_reclaimed_epoch_commits_nothing() {
    let bitmap = marked();
    let stuck = bitmap.begin_epoch().unwrap();
    assert!(bitmap.reclaim_epoch().unwrap());
    let next = bitmap.begin_epoch().unwrap();
    let committed =
        stuck.release_after(|| -> Result<(), ()> { panic!("a reclaimed epoch must not commit") });
    assert!(matches!(committed, Err(ReleaseError::Reclaimed(_))));
    drop(next);
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[test]
fn a_failed_or_panicking_commit_restores_the_marks() {
    let bitmap = marked();
    let epoch = bitmap.begin_epoch().unwrap();
    let failed = epoch.release_after(|| Err::<(), _>("no space"));
    assert_eq!(failed, Err(ReleaseError::Commit("no space")));
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);

    let epoch = bitmap.begin_epoch().unwrap();
    let panicking = || epoch.release_after(|| -> Result<(), ()> { panic!("a commit") });
    catch_unwind(AssertUnwindSafe(panicking)).unwrap_err();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
    bitmap.begin_epoch().unwrap().release().unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn a_full_write_covers_only_earlier_takes() {
    let bitmap = marked();
    let mut written = Coverage::new();
    let began = Coverage::begin_full();
    let mut epoch = bitmap.begin_epoch().unwrap();
    written.add_full(began);
    assert!(!written.covers(&epoch), "the write began before the epoch");
    let began = Coverage::begin_full();
    bitmap.mark(0).unwrap();
    let _ = epoch.extend().unwrap();
    written.add_full(began);
    assert!(
        !written.covers(&epoch),
        "the write began before the second take"
    );
    written.add_full(Coverage::begin_full());
    assert!(written.covers(&epoch));
    written.clear();
    assert!(!written.covers(&epoch));
}

#[test]
fn diffs_cover_an_epoch_if_no_take_is_missing() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    let mut written = Coverage::new();
    bitmap.mark(0).unwrap();
    written.add_diff(&epoch.extend().unwrap());
    assert!(!written.covers(&epoch), "the first take is missing");
    written.add_diff(epoch.bitmap());
    assert!(written.covers(&epoch));
    assert!(epoch.extend().unwrap().is_clean());
    assert!(
        written.covers(&epoch),
        "a take without marks needs no write"
    );
    for address in [0, 0x10_000] {
        bitmap.mark(address).unwrap();
        let more = epoch.extend().unwrap();
        written.add_diff(&more);
        assert!(written.covers(&epoch));
    }
    bitmap.mark(0).unwrap();
    let _ = epoch.extend().unwrap();
    assert!(
        !written.covers(&epoch),
        "a page written before is marked again"
    );
    bitmap.mark(0x20_000).unwrap();
    written.add_diff(&epoch.extend().unwrap());
    assert!(!written.covers(&epoch), "the take before is missing");
}

#[test]
fn a_diff_of_another_epoch_or_bitmap_covers_nothing() {
    let (bitmap, other) = (marked(), marked());
    let mut written = Coverage::new();
    let before = bitmap.begin_epoch().unwrap();
    written.add_diff(before.bitmap());
    drop(before);
    let elsewhere = other.begin_epoch().unwrap();
    written.add_diff(elsewhere.bitmap());
    written.add_diff(&bitmap);
    written.add_diff(&bitmap.drain().unwrap());
    bitmap.mark(0).unwrap();
    let epoch = bitmap.begin_epoch().unwrap();
    assert!(!written.covers(&epoch));
    assert!(written.covers(&elsewhere));
}

#[test]
fn marks_added_after_a_check_are_not_released() {
    for commits in [false, true] {
        let bitmap = marked();
        let mut epoch = bitmap.begin_epoch().unwrap();
        let mut written = Coverage::new();
        assert!(!epoch.check_written(&written));
        written.add_diff(epoch.bitmap());
        assert!(epoch.check_written(&written));
        bitmap.mark(0xf000).unwrap();
        let _ = epoch.extend().unwrap();
        assert!(!epoch.check_written(&written));
        match commits {
            false => {
                let error = epoch.release().unwrap_err();
                assert!(matches!(error, NotReleased::Extended(_)), "{error:?}");
            }
            true => {
                let unchecked = || -> Result<(), ()> { panic!("the epoch has other marks") };
                let error = epoch.release_after(unchecked).unwrap_err();
                assert!(matches!(error, ReleaseError::Extended(_)), "{error:?}");
            }
        }
        assert_eq!(runs(&bitmap), [0x3000..0xc000, 0xf000..0x10000]);
    }
}

#[test]
fn marks_checked_again_or_an_empty_extension_are_released() {
    let bitmap = marked();
    let mut epoch = bitmap.begin_epoch().unwrap();
    let mut written = Coverage::new();
    written.add_diff(epoch.bitmap());
    assert!(epoch.check_written(&written));
    bitmap.mark(0xf000).unwrap();
    written.add_diff(&epoch.extend().unwrap());
    assert!(epoch.check_written(&written));
    let _ = epoch.extend().unwrap();
    epoch.release().unwrap();
    assert!(bitmap.is_clean());
}
