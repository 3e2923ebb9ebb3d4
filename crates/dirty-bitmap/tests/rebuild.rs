//! Rebuilding at another granule, during iteration and against marking threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dirty_bitmap::{DirtyBitmap, GeometryError};
use rstest::rstest;

const SIZE: u64 = 1 << 20;

fn runs(bitmap: &DirtyBitmap) -> Vec<std::ops::Range<u64>> {
    bitmap.runs().collect()
}

#[rstest]
#[case::finer(1024, vec![0x3000..0x4000, 0x8000..0x9000])]
#[case::same(4096, vec![0x3000..0x4000, 0x8000..0x9000])]
#[case::coarser(16384, vec![0..0x4000, 0x8000..0xc000])]
#[case::whole(SIZE, vec![0..SIZE])]
fn a_rebuilt_bitmap_covers_every_marked_byte(
    #[case] granule: u64,
    #[case] expected: Vec<std::ops::Range<u64>>,
) {
    let bitmap = DirtyBitmap::new(0x8000_0000, SIZE, 4096).unwrap();
    bitmap.mark_page(3).unwrap();
    bitmap.mark_page(8).unwrap();
    bitmap.rebuild(granule).unwrap();
    assert_eq!(runs(&bitmap), expected);
    assert_eq!((bitmap.granule(), bitmap.page_size()), (granule, 4096));
    assert!(!bitmap.mark(0x8000_3000).unwrap());
}

#[test]
fn an_index_is_the_same_page_before_and_after_a_rebuild() {
    let bitmap = DirtyBitmap::new(0, SIZE, 16384).unwrap();
    bitmap.rebuild(4096).unwrap();
    bitmap.mark_page(1).unwrap();
    assert_eq!(runs(&bitmap), [16384..32768]);
    bitmap.rebuild(65536).unwrap();
    bitmap.mark_page(63).unwrap();
    assert_eq!(runs(&bitmap), [0..65536, SIZE - 65536..SIZE]);
}

#[test]
fn rebuilding_back_and_forth_leaves_no_stale_mark() {
    let bitmap = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    bitmap.mark(0x3000).unwrap();
    bitmap.rebuild(65536).unwrap();
    drop(bitmap.drain().unwrap());
    bitmap.rebuild(4096).unwrap();
    assert!(bitmap.is_clean());
}

#[test]
fn a_partial_last_page_keeps_its_mark_at_every_granule() {
    let bitmap = DirtyBitmap::new(0, 10_000, 4096).unwrap();
    bitmap.mark(9_999).unwrap();
    for granule in [8192, 1, 2048, 4096] {
        bitmap.rebuild(granule).unwrap();
        assert_eq!(runs(&bitmap), [8192..10_000]);
    }
}

#[test]
fn an_invalid_granule_is_an_error_and_changes_nothing() {
    let bitmap = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    bitmap.mark(0).unwrap();
    assert_eq!(
        bitmap.rebuild(0).unwrap_err(),
        GeometryError::PageSizeNotPowerOfTwo { page_size: 0 }
    );
    assert_eq!(
        bitmap.rebuild(2 * SIZE).unwrap_err(),
        GeometryError::PageLargerThanRam {
            page_size: 2 * SIZE,
            ram_size: SIZE
        }
    );
    assert_eq!((bitmap.granule(), runs(&bitmap)), (4096, vec![0..4096]));
}

#[test]
fn iteration_during_a_rebuild_misses_and_repeats_no_page() {
    let bitmap = DirtyBitmap::new(0, 4 << 20, 4096).unwrap();
    (0..512).for_each(|i| _ = bitmap.mark_page(2 * i).unwrap());
    let mut iter = bitmap.runs();
    let mut seen: Vec<_> = iter.by_ref().take(64).collect();
    // The whole RAM becomes one page, and the first batch ends inside it.
    bitmap.rebuild(4 << 20).unwrap();
    seen.extend(iter);
    assert!(seen.is_sorted_by(|a, b| a.end <= b.start));
    for page in 0..512 {
        assert!(
            seen.iter().any(|run| run.contains(&(page * 8192))),
            "page {page}"
        );
    }
}

/// Returns a bitmap whose iteration takes two batches, with its runs. Every other page is marked,
/// followed by a long run in which the first batch ends.
fn marked_for_two_batches() -> (DirtyBitmap, Vec<std::ops::Range<u64>>) {
    let bitmap = DirtyBitmap::new(0, 8 << 20, 4096).unwrap();
    (0..255).for_each(|i| _ = bitmap.mark_page(2 * i + 1).unwrap());
    bitmap.mark_range(511 * 4096, 989 * 4096).unwrap();
    let runs = runs(&bitmap);
    assert_eq!(
        (runs.len(), runs[255].clone()),
        (256, 511 * 4096..1500 * 4096)
    );
    (bitmap, runs)
}

#[rstest]
#[case::finer(512)]
#[case::coarser(65536)]
#[case::page_begins_before_the_batch(4 << 20)]
fn a_partial_run_continues_after_a_rebuild(#[case] granule: u64) {
    let (bitmap, mut expected) = marked_for_two_batches();
    let mut iter = bitmap.runs();
    assert_eq!(iter.next(), Some(expected[0].clone()));
    bitmap.rebuild(granule).unwrap();
    expected[255].end = expected[255].end.next_multiple_of(granule);
    assert_eq!(iter.collect::<Vec<_>>(), expected[1..]);
}

#[rstest]
#[case::same(4096)]
#[case::finer(512)]
#[case::page_begins_before_the_batch(4 << 20)]
fn a_partial_run_ends_with_its_batch_after_a_drain(#[case] granule: u64) {
    let (bitmap, mut expected) = marked_for_two_batches();
    let mut iter = bitmap.runs();
    assert_eq!(iter.next(), Some(expected[0].clone()));
    drop(bitmap.drain().unwrap());
    bitmap.rebuild(granule).unwrap();
    expected[255].end = 512 * 4096;
    assert_eq!(iter.collect::<Vec<_>>(), expected[1..]);
}

#[test]
fn iteration_finds_later_marks_after_a_drain_and_a_rebuild() {
    let (bitmap, _) = marked_for_two_batches();
    let mut iter = bitmap.runs();
    iter.next();
    drop(bitmap.drain().unwrap());
    // The iteration continues in a word that has no marks any more. The new mark is in the next
    // word.
    bitmap.rebuild(65536).unwrap();
    bitmap.mark(64 * 65536).unwrap();
    assert_eq!(iter.last(), Some(64 * 65536..65 * 65536));
}

/// This uses real threads, one of which drains. `tests/loom.rs` explores the interleavings.
#[test]
fn concurrent_rebuilds_and_drains_lose_no_mark() {
    const MARKERS: u64 = 4;
    const ROUNDS: u64 = 50;
    let pages = SIZE / 4096;
    let bitmap = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    let collected = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    let done = AtomicBool::new(false);

    for round in 0..ROUNDS {
        done.store(false, Ordering::Relaxed);
        thread::scope(|scope| {
            let markers: Vec<_> = (0..MARKERS)
                .map(|m| {
                    let bitmap = &bitmap;
                    scope.spawn(move || {
                        (m..pages)
                            .step_by(MARKERS as usize)
                            .for_each(|page| _ = bitmap.mark_page(page).unwrap());
                    })
                })
                .collect();
            scope.spawn(|| {
                for granule in [512, 16384, 4096, 65536].into_iter().cycle() {
                    bitmap.rebuild(granule).unwrap();
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    bitmap.drain_into(&collected).unwrap();
                }
            });
            markers
                .into_iter()
                .for_each(|marker| marker.join().unwrap());
            done.store(true, Ordering::Relaxed);
        });
        bitmap.drain_into(&collected).unwrap();
        assert_eq!(runs(&collected), [0..SIZE], "round {round}");
        drop(collected.drain().unwrap());
    }
}
