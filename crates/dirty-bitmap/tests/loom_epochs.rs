//! Loom models of epochs against marking, rebuilding, reclaiming and other epochs.
//!
//! Run with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p ramsnap-dirty-bitmap --test loom_epochs
//! --release`.
//!
//! The contents of the pages are atomics with relaxed ordering. A drain that takes a mark without
//! seeing the write before it is therefore detected too.
//!
//! With `RAMSNAP_THOROUGH=1`, a model without a bound on preemptions is exhaustive, and other
//! models state their bound. Without it, at most 2 preemptions are tried.

#![cfg(ramsnap_loom)]

#[path = "support/exploration.rs"]
mod exploration;
#[path = "support/guest.rs"]
mod guest;

use dirty_bitmap::DirtyBitmap;
use exploration::{exhaustively, with_preemptions};
use guest::{Guest, PAGE, copy, write_in_thread};
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::{Arc, Mutex};
use loom::thread;

#[test]
fn a_mark_racing_a_failed_epoch_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let writer = write_in_thread(&guest, &[(1, 2)]);
        drop(guest.bitmap.begin_epoch().unwrap());
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

/// At most 3 preemptions.
#[test]
fn a_failed_epoch_racing_a_rebuild_restores_its_marks() {
    with_preemptions(3, || {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let writer = write_in_thread(&guest, &[(1, 2)]);
        let epoch = guest.bitmap.begin_epoch().unwrap();
        let rebuilder = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.bitmap.rebuild(2 * PAGE).unwrap())
        };
        drop(epoch);
        writer.join().unwrap();
        rebuilder.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

#[test]
fn two_epochs_never_overlap() {
    exhaustively(|| {
        let guest = Guest::new(1);
        guest.write(0, 1);
        let other = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || drop(guest.bitmap.begin_epoch()))
        };
        if let Ok(epoch) = guest.bitmap.begin_epoch() {
            // The other epoch has ended and restored its marks, or it has not begun and will be
            // refused.
            assert!(epoch.bitmap().is_dirty(0).unwrap());
        }
        other.join().unwrap();
        assert!(guest.bitmap.is_dirty(0).unwrap());
    });
}

/// A save is taken for stuck and reclaimed, but it takes more marks and ends.
#[test]
fn a_reclaim_racing_a_save_loses_no_mark() {
    with_preemptions(3, || {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let writer = write_in_thread(&guest, &[(1, 2)]);
        let mut epoch = guest.bitmap.begin_epoch().unwrap();
        let reclaimer = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.bitmap.reclaim_epoch().unwrap())
        };
        let mut image = vec![0; 2];
        copy(&guest.pages, epoch.bitmap(), &mut image);
        if let Ok(more) = epoch.extend() {
            copy(&guest.pages, &more, &mut image);
        }
        // Only a released epoch counts as saved.
        let released = epoch.release().is_ok();
        let image = if released { image } else { vec![0; 2] };
        let reclaimed = reclaimer.join().unwrap();
        assert!(released != reclaimed, "either released or reclaimed");
        writer.join().unwrap();
        guest.assert_saved(image);
    });
}

/// The next save begins as soon as the marks are restored, and both end.
#[test]
fn a_reclaim_racing_a_failed_epoch_loses_no_mark() {
    with_preemptions(3, || {
        let guest = Guest::new(1);
        guest.write(0, 1);
        let stuck = guest.bitmap.begin_epoch().unwrap();
        let failing = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                if guest.bitmap.reclaim_epoch().unwrap()
                    && let Ok(epoch) = guest.bitmap.begin_epoch()
                {
                    // It is the only epoch, and has the mark.
                    assert!(epoch.bitmap().is_dirty(0).unwrap());
                }
            })
        };
        drop(stuck);
        failing.join().unwrap();
        guest.assert_saved(vec![0]);
    });
}

/// A save is taken for stuck and reclaimed, but it commits. The next save commits to the same
/// destination.
#[test]
fn a_commit_racing_a_reclaim_loses_no_page() {
    with_preemptions(3, || {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let destination = Arc::new(Mutex::new(vec![0; 2]));
        let epoch = guest.bitmap.begin_epoch().unwrap();
        let mut diff = Vec::new();
        collect(&guest.pages, epoch.bitmap(), &mut diff);
        let next = {
            let (guest, destination) = (Arc::clone(&guest), Arc::clone(&destination));
            thread::spawn(move || {
                guest.write(1, 2);
                if guest.bitmap.reclaim_epoch() == Ok(true)
                    && let Ok(epoch) = guest.bitmap.begin_epoch()
                {
                    let mut diff = Vec::new();
                    collect(&guest.pages, epoch.bitmap(), &mut diff);
                    let committed = epoch.release_after(|| commit(&destination, &diff));
                    assert!(committed.is_ok(), "no thread reclaims this epoch");
                }
            })
        };
        let _ = epoch.release_after(|| commit(&destination, &diff));
        next.join().unwrap();
        let image = destination.lock().unwrap().clone();
        guest.assert_saved(image);
    });
}

/// Collects the contents of the pages marked in `taken`.
fn collect<K>(pages: &[AtomicU64], taken: &DirtyBitmap<K>, diff: &mut Vec<(usize, u64)>) {
    for page in 0..pages.len() {
        if taken.is_dirty(page as u64 * PAGE).unwrap() {
            diff.push((page, pages[page].load(Relaxed)));
        }
    }
}

/// Replaces the destination by a diff on top of zero pages.
fn commit(destination: &Mutex<Vec<u64>>, diff: &[(usize, u64)]) -> Result<(), ()> {
    let mut image = vec![0; 2];
    diff.iter().for_each(|(page, value)| image[*page] = *value);
    *destination.lock().unwrap() = image;
    Ok(())
}

/// An epoch reuses the bitmap of an epoch that ended on another thread.
#[test]
fn a_release_racing_the_next_epoch_mixes_no_marks() {
    with_preemptions(3, || {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let epoch = guest.bitmap.begin_epoch().unwrap();
        let mut image = vec![0; 2];
        copy(&guest.pages, epoch.bitmap(), &mut image);
        let next = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                guest.write(1, 2);
                if let Ok(next) = guest.bitmap.begin_epoch() {
                    assert!(
                        !next.bitmap().is_dirty(0).unwrap(),
                        "a mark of the earlier epoch"
                    );
                    assert!(next.bitmap().is_dirty(PAGE).unwrap());
                }
            })
        };
        epoch.release().unwrap();
        next.join().unwrap();
        guest.assert_saved(image);
    });
}
