//! Every interleaving, under `RUSTFLAGS="--cfg memsnap_loom" cargo test -p dirty-bitmap --test loom --release`.
//!
//! Each model also counts what loom's memory model can reorder: the page that is marked is an atomic with relaxed ordering, so
//! that a drain which takes a mark without seeing the write before it is found as well.
//!
//! With `MEMSNAP_THOROUGH=1`, a model with no bound on preemptions is exhaustive; where one is set,
//! it is named at the model. Without it, at most 2 preemptions are tried.

#![cfg(memsnap_loom)]

mod interleavings;

use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use interleavings::{exhaustively, with_preemptions};
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::{Arc, Mutex};
use loom::thread;

const PAGE: u64 = 4096;

/// A guest of a few pages: their contents, and the bitmap over them.
struct Guest {
    pages: Vec<AtomicU64>,
    bitmap: DirtyBitmap,
}

impl Guest {
    fn new(pages: u64) -> Arc<Self> {
        let bitmap = DirtyBitmap::new(0, pages * PAGE, PAGE).unwrap();
        Arc::new(Self {
            pages: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            bitmap,
        })
    }

    /// Writes a page, then marks it.
    fn write(&self, page: u64, value: u64) {
        self.pages[page as usize].store(value, Relaxed);
        self.bitmap.set_dirty_by_index(page).unwrap();
    }

    /// Takes the marks and copies the pages that they name.
    fn save(&self, image: &mut [u64]) {
        let taken = self.bitmap.drain().unwrap();
        copy(&self.pages, &taken, image);
    }

    /// What a save of what is marked now makes of `image`.
    fn assert_saved(&self, mut image: Vec<u64>) {
        self.save(&mut image);
        let pages: Vec<u64> = self.pages.iter().map(|page| page.load(Relaxed)).collect();
        assert_eq!(
            image, pages,
            "a written page is neither in the image nor marked"
        );
    }
}

fn copy<K>(pages: &[AtomicU64], taken: &DirtyBitmap<K>, image: &mut [u64]) {
    let covers = |run: &Range<u64>, page: u64| run.contains(&(page * PAGE));
    for run in taken.runs() {
        for page in (0..pages.len() as u64).filter(|page| covers(&run, *page)) {
            image[page as usize] = pages[page as usize].load(Relaxed);
        }
    }
}

fn write_in_thread(guest: &Arc<Guest>, writes: &'static [(u64, u64)]) -> thread::JoinHandle<()> {
    let guest = Arc::clone(guest);
    thread::spawn(move || {
        writes
            .iter()
            .for_each(|(page, value)| guest.write(*page, *value))
    })
}

#[test]
fn a_mark_against_a_drain() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        let mut image = vec![0; 2];
        guest.save(&mut image);
        writer.join().unwrap();
        guest.assert_saved(image);
    });
}

/// What a plain load in place of the read-modify-write would lose.
#[test]
fn a_page_that_is_already_marked_is_written_again_against_a_drain() {
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
fn two_markers_of_one_word_against_a_drain() {
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

/// A mark that was complete before a drain began is in that drain, also where another marker of the same word is under way.
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
fn a_mark_of_the_last_page_against_a_count_of_the_dirty_bytes() {
    exhaustively(|| {
        // The last page is cut: counted, it is less than a page, and not yet counted, nothing.
        let bitmap = Arc::new(DirtyBitmap::new(0, PAGE + 1, PAGE).unwrap());
        let marker = {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.set_dirty_by_index(1).unwrap())
        };
        let counted = bitmap.dirty_bytes();
        assert!([0, 1].contains(&counted), "{counted} bytes of a page of 1");
        marker.join().unwrap();
        assert_eq!(bitmap.dirty_bytes(), 1);
    });
}

#[test]
fn a_mark_against_a_rebuild_to_finer_pages() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

#[test]
fn a_mark_against_a_rebuild_to_coarser_pages() {
    exhaustively(|| {
        let guest = Guest::new(2);
        let writer = write_in_thread(&guest, &[(0, 1), (1, 2)]);
        guest.bitmap.rebuild(2 * PAGE).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0; 2]);
    });
}

/// The published granule comes back to the one that a marker saw.
#[test]
fn a_mark_against_a_rebuild_there_and_back_again() {
    exhaustively(|| {
        let guest = Guest::new(1);
        let writer = write_in_thread(&guest, &[(0, 1)]);
        guest.bitmap.rebuild(PAGE / 2).unwrap();
        guest.bitmap.rebuild(PAGE).unwrap();
        writer.join().unwrap();
        guest.assert_saved(vec![0]);
    });
}

/// A mark that missed the sweep lies in a table that is out of use, and must not appear when that is used again.
#[test]
fn a_mark_that_came_late_does_not_come_back_after_it_was_saved() {
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

/// More than one word in the finer table.
#[test]
fn marks_against_a_rebuild_to_a_table_of_several_words() {
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
fn two_markers_against_a_rebuild() {
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
fn a_mark_against_a_rebuild_and_a_drain() {
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

#[test]
fn a_mark_against_an_epoch_that_fails() {
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
fn a_failing_epoch_against_a_rebuild_and_a_mark() {
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
            // The other one is over, and has given back what it took; or it has not begun, and will be refused.
            assert!(epoch.bitmap().is_dirty(0).unwrap());
        }
        other.join().unwrap();
        assert!(guest.bitmap.is_dirty(0).unwrap());
    });
}

/// A save whose thread is thought to be stuck, and is not: it takes more marks, and ends.
#[test]
fn a_reclaimed_epoch_against_its_own_save_and_a_mark() {
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
        if let Ok(more) = epoch.take_more() {
            copy(&guest.pages, more, &mut image);
        }
        // Only what is released counts as saved.
        let released = epoch.release().is_ok();
        let image = if released { image } else { vec![0; 2] };
        let reclaimed = reclaimer.join().unwrap();
        assert!(released != reclaimed, "once released or once reclaimed");
        writer.join().unwrap();
        guest.assert_saved(image);
    });
}

/// The next save begins as soon as the marks are back, and both end.
#[test]
fn a_reclaimed_epoch_that_fails_against_the_next_one() {
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
                    // It is the only one, and has the mark.
                    assert!(epoch.bitmap().is_dirty(0).unwrap());
                }
            })
        };
        drop(stuck);
        failing.join().unwrap();
        guest.assert_saved(vec![0]);
    });
}

/// A save is thought to be stuck, and commits. The save after it commits to the same place.
#[test]
fn a_save_that_commits_against_its_reclaim_and_the_next_save() {
    with_preemptions(3, || {
        let guest = Guest::new(2);
        guest.write(0, 1);
        let place = Arc::new(Mutex::new(vec![0; 2]));
        let epoch = guest.bitmap.begin_epoch().unwrap();
        let mut diff = Vec::new();
        collect(&guest.pages, epoch.bitmap(), &mut diff);
        let next = {
            let (guest, place) = (Arc::clone(&guest), Arc::clone(&place));
            thread::spawn(move || {
                guest.write(1, 2);
                if guest.bitmap.reclaim_epoch() == Ok(true)
                    && let Ok(epoch) = guest.bitmap.begin_epoch()
                {
                    let mut diff = Vec::new();
                    collect(&guest.pages, epoch.bitmap(), &mut diff);
                    let committed = epoch.release_after(|| commit(&place, &diff));
                    assert!(committed.is_ok(), "nothing reclaims it");
                }
            })
        };
        let _ = epoch.release_after(|| commit(&place, &diff));
        next.join().unwrap();
        let image = place.lock().unwrap().clone();
        guest.assert_saved(image);
    });
}

/// The pages that `taken` names, with their contents.
fn collect<K>(pages: &[AtomicU64], taken: &DirtyBitmap<K>, diff: &mut Vec<(usize, u64)>) {
    for page in 0..pages.len() {
        if taken.is_dirty(page as u64 * PAGE).unwrap() {
            diff.push((page, pages[page].load(Relaxed)));
        }
    }
}

/// Replaces what is at the place by a diff on top of clean pages.
fn commit(place: &Mutex<Vec<u64>>, diff: &[(usize, u64)]) -> Result<(), ()> {
    let mut image = vec![0; 2];
    diff.iter().for_each(|(page, value)| image[*page] = *value);
    *place.lock().unwrap() = image;
    Ok(())
}

/// An epoch gets the bitmap of one that has ended on another thread.
#[test]
fn an_epoch_that_is_released_against_the_next_one() {
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
                    assert!(!next.bitmap().is_dirty(0).unwrap(), "a mark of before");
                    assert!(next.bitmap().is_dirty(PAGE).unwrap());
                }
            })
        };
        epoch.release().unwrap();
        next.join().unwrap();
        guest.assert_saved(image);
    });
}
