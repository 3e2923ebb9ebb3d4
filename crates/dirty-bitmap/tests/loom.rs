//! Loom models of marking against draining and rebuilding.
//!
//! Run with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p ramsnap-dirty-bitmap --test loom
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
use guest::{Guest, PAGE, write_in_thread};
use loom::sync::Arc;
use loom::thread;

#[test]
fn a_mark_racing_a_drain_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        let mut image = vec![0; 2];
        guest.save(&mut image);
        writer.join().unwrap();
        guest.assert_saved(image);
    });
}

/// A plain load in place of the read-modify-write loses this mark.
#[test]
fn a_repeated_mark_racing_a_drain_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(1);
        guest.write(0, 1);
        let writer = write_in_thread(&guest, &[(0, 2)]);
        let mut image = vec![0];
        guest.save(&mut image);
        writer.join().unwrap();
        guest.assert_saved(image);
    });
}

#[test]
fn two_marks_in_a_word_racing_a_drain_are_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writers = [
            write_in_thread(&guest, &[(0, 1)]),
            write_in_thread(&guest, &[(1, 2)]),
        ];
        let mut image = vec![0; 2];
        guest.save(&mut image);
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap());
        guest.assert_saved(image);
    });
}

/// The drain has a mark that was complete before, even while another thread marks the same word.
#[test]
fn a_complete_mark_is_in_the_next_drain() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let other = write_in_thread(&guest, &[(1, 2)]);
        guest.write(0, 1);
        assert!(guest.bitmap.drain().unwrap().is_dirty(0).unwrap());
        other.join().unwrap();
    });
}

#[test]
fn dirty_bytes_racing_a_mark_is_consistent() {
    exhaustively(|| {
        // The last page has one byte, so it counts as 1 or 0.
        let bitmap = Arc::new(DirtyBitmap::new(0, PAGE + 1, PAGE).unwrap());
        let marker = {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.mark_page(1).unwrap())
        };
        let counted = bitmap.dirty_bytes();
        assert!([0, 1].contains(&counted), "{counted} bytes counted");
        marker.join().unwrap();
        assert_eq!(bitmap.dirty_bytes(), 1);
    });
}

#[test]
fn a_mark_racing_a_rebuild_to_finer_pages_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

#[test]
fn a_mark_racing_a_rebuild_to_coarser_pages_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        guest.bitmap.rebuild(2 * PAGE).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

/// The published granule returns to the one that the marker saw.
#[test]
fn a_mark_racing_two_rebuilds_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(1);
        let writer = write_in_thread(&guest, &[(0, 1)]);
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        guest.bitmap.rebuild(PAGE).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0]);
    });
}

/// A mark that missed the sweep stays in an unused table. It must not reappear when that table is
/// used again.
#[test]
fn a_late_mark_does_not_reappear_after_its_save() {
    exhaustively(|| {
        let guest = Guest::new(1);
        let writer = write_in_thread(&guest, &[(0, 1)]);
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0]);
        guest.bitmap.rebuild(PAGE).unwrap();
        assert!(guest.bitmap.is_clean());
    });
}

/// The finer table has more than one word.
#[test]
fn marks_racing_a_rebuild_to_several_words_are_kept() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(1, 1), (0, 2)]);
        guest.bitmap.rebuild(PAGE / 64).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

/// At most 2 preemptions.
#[test]
fn marks_of_two_threads_racing_a_rebuild_are_kept() {
    with_preemptions(2, || {
        let guest = Guest::new(2);
        let writers = [
            write_in_thread(&guest, &[(0, 1), (1, 2)]),
            write_in_thread(&guest, &[(1, 3)]),
        ];
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap());
        guest.assert_saved(vec![0; 2]);
    });
}

#[test]
fn a_mark_racing_a_rebuild_and_a_drain_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(1);
        let writer = write_in_thread(&guest, &[(0, 1)]);
        let rebuilder = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.bitmap.rebuild(PAGE / 2).unwrap())
        };
        let mut image = vec![0];
        guest.save(&mut image);
        writer.join().unwrap();
        rebuilder.join().unwrap();
        guest.assert_saved(image);
    });
}
