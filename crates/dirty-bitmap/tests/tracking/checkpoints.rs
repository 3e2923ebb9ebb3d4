//! Checkpoints: the pages they take and protect, failures, and exclusive use of the bitmap.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dirty_bitmap::{
    BLOCK_SIZE, BeginEpochError, CheckpointError, ExtendError, Policy, TrackedBitmap, TrackerError,
    WriteTracker,
};
use rstest::rstest;

use crate::machine::{
    Call, Machine, PAGE, PAGES_PER_BLOCK, Refusing, START, checkpoint, protected,
};

#[test]
fn the_first_checkpoint_takes_and_protects_all_ram() {
    let machine = Machine::new(START, 4 * PAGES_PER_BLOCK, PAGE);
    let tracker = machine.tracked(Policy::Pages);
    assert_eq!(checkpoint(&machine, &tracker), [0..4 * PAGES_PER_BLOCK]);
    assert_eq!(
        machine.calls(),
        [Call::Protect(START..START + 4 * BLOCK_SIZE)]
    );
}

#[test]
fn a_checkpoint_protects_nearby_runs_in_one_call() {
    let (machine, tracker) = protected(2, Policy::Pages);
    for page in [3, 10, 100, 101] {
        machine.write(&tracker, page, 1);
    }
    machine.calls();
    checkpoint(&machine, &tracker);
    let at = |page: u64| START + page * PAGE;
    assert_eq!(
        machine.calls(),
        [
            Call::Protect(at(3)..at(11)),
            Call::Protect(at(100)..at(102))
        ]
    );
}

#[test]
fn a_host_write_is_in_the_checkpoint() {
    let (machine, tracker) = protected(1, Policy::default());
    machine.host_write(&tracker, 7, 1);
    assert_eq!(checkpoint(&machine, &tracker), [7..8]);
}

#[test]
fn a_checkpoint_during_a_save_is_an_error_and_has_no_effect() {
    let (machine, tracker) = protected(1, Policy::Pages);
    let epoch = tracker.checkpoint(&machine).unwrap();
    machine.write(&tracker, 3, 1);
    machine.calls();
    let second = tracker.checkpoint(&machine);
    assert!(matches!(
        second,
        Err(CheckpointError::Epoch(BeginEpochError::AlreadyOpen))
    ));
    assert_eq!(machine.calls(), []);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&machine, &tracker), [3..4]);
}

#[test]
fn the_marks_of_a_failed_save_are_in_the_next_checkpoint() {
    let (machine, tracker) = protected(1, Policy::Pages);
    machine.write(&tracker, 3, 1);
    drop(tracker.checkpoint(&machine).unwrap());
    machine.write(&tracker, 5, 1);
    machine.calls();
    assert_eq!(checkpoint(&machine, &tracker), [3..4, 5..6]);
    let at = |page: u64| START + page * PAGE;
    assert_eq!(machine.calls(), [Call::Protect(at(3)..at(6))]);
}

#[test]
fn pages_of_a_failed_checkpoint_stay_dirty() {
    let (machine, tracker) = protected(1, Policy::Pages);
    for page in [0, 1, 120, 121] {
        machine.write(&tracker, page, 1);
    }
    // The second call fails half-way, and protecting all RAM fails too.
    machine.calls_left.store(1, Ordering::SeqCst);
    let failed = tracker.checkpoint(&machine);
    assert!(matches!(failed, Err(CheckpointError::Protect { .. })));
    machine.calls_left.store(u64::MAX, Ordering::SeqCst);
    // Page 121 was never protected.
    assert_eq!(machine.write(&tracker, 121, 2), 0);
    assert_eq!(checkpoint(&machine, &tracker), [0..2, 120..122]);
    assert_eq!(machine.write(&tracker, 121, 3), 1);
}

#[test]
fn pages_of_a_failed_extension_are_in_the_next_checkpoint() {
    let (machine, tracker) = protected(1, Policy::Pages);
    let mut epoch = tracker.checkpoint(&machine).unwrap();
    machine.write(&tracker, 60, 1);
    machine.calls_left.store(0, Ordering::SeqCst);
    let failed = tracker.checkpoint_incremental(&mut epoch, &machine);
    assert!(matches!(failed, Err(CheckpointError::Protect { .. })));
    machine.calls_left.store(u64::MAX, Ordering::SeqCst);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&machine, &tracker), [60..61]);
}

#[test]
fn a_refused_small_range_protects_all_ram() {
    let (machine, tracker) = protected(2, Policy::Pages);
    machine.write(&tracker, 60, 1);
    machine.calls();
    let refusing = Refusing(
        &machine,
        |call: &Call| matches!(call, Call::Protect(range) if range.end - range.start < BLOCK_SIZE),
    );
    tracker.checkpoint(&refusing).unwrap().release().unwrap();
    assert_eq!(
        machine.calls(),
        [Call::Protect(START..START + 2 * BLOCK_SIZE)]
    );
}

#[rstest]
#[case::pages_larger_than_a_block(0, 8 << 20, 4 << 20, "at most 2097152")]
#[case::start_inside_a_page(4096, 1 << 20, 16384, "does not consist of whole pages")]
#[case::end_inside_a_page(0, (1 << 20) + 4096, 16384, "does not consist of whole pages")]
fn ram_that_cannot_be_protected_is_an_error(
    #[case] start: u64,
    #[case] size: u64,
    #[case] page: u64,
    #[case] message: &str,
) {
    let bitmap = Arc::new(TrackedBitmap::tracked(start, size, page).unwrap());
    let refused: TrackerError = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages).unwrap_err();
    assert!(refused.to_string().contains(message), "{refused}");
    assert!(bitmap.is_clean());
}

#[test]
fn pages_as_large_as_a_block_are_tracked() {
    let bitmap = TrackedBitmap::tracked(0, 4 * BLOCK_SIZE, BLOCK_SIZE).unwrap();
    let tracker = WriteTracker::new(Arc::new(bitmap), Policy::Pages).unwrap();
    assert_eq!(tracker.bitmap().page_size(), BLOCK_SIZE);
}

#[test]
fn a_bitmap_has_one_tracker_at_a_time() {
    let (_machine, tracker) = protected(1, Policy::Pages);
    let bitmap = Arc::clone(tracker.bitmap());
    let second = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages);
    assert_eq!(second.unwrap_err(), TrackerError::AlreadyTracked);
    assert!(bitmap.is_clean(), "a failed call marks nothing");
    drop(tracker);
    let second = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages).unwrap();
    assert_eq!(bitmap.dirty_bytes(), BLOCK_SIZE);
    drop(second);
}

#[test]
fn the_epoch_of_another_tracker_is_an_error() {
    let (machine, tracker) = protected(1, Policy::Pages);
    let (other_machine, other) = protected(1, Policy::Pages);
    let mut epoch = other.checkpoint(&other_machine).unwrap();
    other_machine.write(&other, 3, 1);
    let refused = tracker.checkpoint_incremental(&mut epoch, &machine);
    assert!(matches!(refused, Err(CheckpointError::OtherBitmap)));
    // The failed call took no mark: the page is still in the next checkpoint.
    other_machine.write(&other, 3, 2);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&other_machine, &other), [3..4]);
}

#[test]
fn a_reclaimed_checkpoint_is_in_the_next_one() {
    let (machine, tracker) = protected(1, Policy::Pages);
    machine.write(&tracker, 3, 1);
    let mut stuck = tracker.checkpoint(&machine).unwrap();
    assert!(tracker.reclaim_epoch().unwrap());
    machine.write(&tracker, 5, 1);
    machine.calls();
    let more = tracker.checkpoint_incremental(&mut stuck, &machine);
    let reclaimed = matches!(
        more,
        Err(CheckpointError::Extend(ExtendError::Reclaimed(_)))
    );
    assert!(reclaimed);
    assert_eq!(machine.calls(), []);
    assert_eq!(checkpoint(&machine, &tracker), [3..4, 5..6]);
    let at = |page: u64| START + page * PAGE;
    assert_eq!(machine.calls(), [Call::Protect(at(3)..at(6))]);
    assert!(stuck.release().is_err());
}
