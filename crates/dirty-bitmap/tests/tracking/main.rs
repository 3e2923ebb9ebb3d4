//! What a write fault opens, and what a checkpoint protects.

mod machine;
mod oracle;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dirty_bitmap::{
    ArmError, BLOCK_SIZE, BeginEpochError, Costs, FaultError, Policy, TakeMoreError, TrackedBitmap,
    TrackerError, WriteTracker,
};
use machine::{Call, Machine};
use rstest::rstest;

const PAGE: u64 = 16 << 10;
const PAGES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE;
const START: u64 = 0x8000_0000;

/// Of `blocks` blocks, protected and clean.
fn armed(blocks: u64, policy: Policy) -> (Machine, WriteTracker) {
    let machine = Machine::new(START, blocks * PAGES_PER_BLOCK, PAGE);
    let tracker = machine.tracked(policy);
    tracker.arm(&machine).unwrap().release().unwrap();
    machine.calls();
    (machine, tracker)
}

/// What was marked, in pages from the start of the RAM.
fn checkpoint(machine: &Machine, tracker: &WriteTracker) -> Vec<std::ops::Range<u64>> {
    let epoch = tracker.arm(machine).unwrap();
    let runs = epoch.bitmap().runs();
    let runs = runs.map(|run| run.start / PAGE..run.end / PAGE).collect();
    epoch.release().unwrap();
    runs
}

#[test]
fn until_it_is_protected_no_page_counts_as_clean_and_one_call_protects_all() {
    let machine = Machine::new(START, 4 * PAGES_PER_BLOCK, PAGE);
    let tracker = machine.tracked(Policy::Pages);
    assert_eq!(checkpoint(&machine, &tracker), [0..4 * PAGES_PER_BLOCK]);
    assert_eq!(
        machine.calls(),
        [Call::Protect(START..START + 4 * BLOCK_SIZE)]
    );
}

#[rstest]
#[case::a_page(Policy::Pages, 5..6)]
#[case::a_block(Policy::Blocks, 0..PAGES_PER_BLOCK)]
fn a_fault_opens_and_marks(#[case] policy: Policy, #[case] pages: std::ops::Range<u64>) {
    let (machine, tracker) = armed(2, policy);
    let opened = tracker
        .on_write_fault(START + 5 * PAGE + 77, &machine)
        .unwrap();
    assert_eq!(opened, START + pages.start * PAGE..START + pages.end * PAGE);
    assert_eq!(machine.calls(), [Call::Lift(opened)]);
    assert_eq!(checkpoint(&machine, &tracker), [pages]);
}

#[test]
fn the_last_block_ends_where_the_ram_does() {
    let machine = Machine::new(START, PAGES_PER_BLOCK + 3, PAGE);
    let tracker = machine.tracked(Policy::Blocks);
    tracker.arm(&machine).unwrap().release().unwrap();
    machine.write(&tracker, PAGES_PER_BLOCK + 1, 1);
    assert_eq!(
        checkpoint(&machine, &tracker),
        [PAGES_PER_BLOCK..PAGES_PER_BLOCK + 3]
    );
}

#[test]
fn a_checkpoint_protects_near_runs_by_one_call_and_far_ones_by_their_own() {
    let (machine, tracker) = armed(2, Policy::Pages);
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
fn a_page_that_only_the_host_wrote_is_in_the_checkpoint() {
    let (machine, tracker) = armed(1, Policy::default());
    machine.host_write(&tracker, 7, 1);
    assert_eq!(checkpoint(&machine, &tracker), [7..8]);
}

#[test]
fn with_a_fault_limit_the_rest_of_a_block_is_opened_by_the_fault_that_passes_it() {
    let (machine, tracker) = armed(1, Policy::FaultLimit(4));
    for _ in 0..3 {
        let faults: u64 = (0..PAGES_PER_BLOCK)
            .map(|page| machine.write(&tracker, page, 1))
            .sum();
        assert_eq!(faults, 5);
        assert_eq!(checkpoint(&machine, &tracker), [0..PAGES_PER_BLOCK]);
        machine.write(&tracker, 9, 1);
        assert_eq!(checkpoint(&machine, &tracker), [9..10]);
    }
}

/// One interval: writes the first `pages` pages of block 0, and says how many faults and pages that was.
fn interval(machine: &Machine, tracker: &WriteTracker, pages: u64) -> (u64, u64) {
    // Not from page to page, as who sweeps the memory.
    let spread = (0..PAGES_PER_BLOCK).map(|page| page * 37 % PAGES_PER_BLOCK);
    let spread = spread.filter(|page| *page < pages);
    let faults = spread.map(|page| machine.write(tracker, page, 1)).sum();
    let marked = checkpoint(machine, tracker);
    (faults, marked.iter().map(|run| run.end - run.start).sum())
}

#[test]
fn a_block_that_is_written_all_over_takes_fewer_faults_each_time_and_at_last_one() {
    let (machine, tracker) = armed(1, Policy::default());
    let faults = || interval(&machine, &tracker, PAGES_PER_BLOCK).0;
    assert_eq!(faults(), PAGES_PER_BLOCK);
    // Those before it is opened, and at most a sixteenth of it that stays protected as a sample.
    for before in [8, 4, 2] {
        let faults = faults();
        assert!((before..=before + 8).contains(&faults), "{faults}");
    }
    // Then one, and a sample now and then.
    let later: Vec<u64> = (0..32).map(|_| faults()).collect();
    assert_eq!(later.iter().filter(|faults| **faults == 1).count(), 28);
    assert!(later.iter().all(|faults| *faults <= 9), "{later:?}");
}

#[test]
fn a_block_that_is_written_here_and_there_stays_in_pages() {
    let (machine, tracker) = armed(1, Policy::default());
    for _ in 0..20 {
        assert_eq!(interval(&machine, &tracker, 9), (9, 9));
    }
}

#[test]
fn a_block_far_up_in_the_ram_stays_in_pages_too() {
    let (machine, tracker) = armed(4, Policy::default());
    let pages = [3, 50, 51].map(|page| 3 * PAGES_PER_BLOCK + page);
    for _ in 0..20 {
        let faults: u64 = pages
            .map(|page| machine.write(&tracker, page, 1))
            .iter()
            .sum();
        assert_eq!(faults, 3);
        assert_eq!(checkpoint(&machine, &tracker).len(), 2);
        assert_eq!(tracker.whole_blocks(), 0);
    }
}

#[test]
fn a_block_that_is_no_longer_written_all_over_goes_back_to_pages() {
    let (machine, tracker) = armed(1, Policy::default());
    for _ in 0..40 {
        interval(&machine, &tracker, PAGES_PER_BLOCK);
    }
    assert_eq!(tracker.whole_blocks(), 1);
    let dirty: Vec<u64> = (0..40).map(|_| interval(&machine, &tracker, 2).1).collect();
    // Until a sample or two have shown it.
    let back = dirty.iter().position(|pages| *pages == 2);
    assert!(back.is_some_and(|at| at < 20), "{dirty:?}");
    assert!(dirty[20..].iter().all(|pages| *pages == 2), "{dirty:?}");
    assert_eq!(tracker.whole_blocks(), 0);
}

#[test]
fn one_write_in_a_block_that_has_been_written_all_over_once_opens_its_page() {
    let (machine, tracker) = armed(1, Policy::default());
    interval(&machine, &tracker, PAGES_PER_BLOCK);
    assert_eq!(tracker.whole_blocks(), 1);
    assert_eq!(interval(&machine, &tracker, 1), (1, 1));
}

/// The part that is left closed as a sample may be where somebody writes, and the pages around it not.
#[test]
fn a_sample_alone_does_not_make_a_block_dense() {
    let (machine, tracker) = armed(1, Policy::default());
    for _ in 0..64 {
        assert_eq!(interval(&machine, &tracker, 8), (8, 8));
    }
}

#[test]
fn who_sweeps_the_memory_takes_one_fault_a_block_once_it_is_noticed() {
    let (machine, tracker) = armed(8, Policy::default());
    let faults: u64 = (0..8 * PAGES_PER_BLOCK)
        .map(|page| machine.write(&tracker, page, 1))
        .sum();
    assert_eq!(faults, PAGES_PER_BLOCK + 7);

    let (machine, tracker) = armed(8, Policy::default());
    let down = (0..8 * PAGES_PER_BLOCK).rev();
    let faults: u64 = down.map(|page| machine.write(&tracker, page, 1)).sum();
    assert_eq!(faults, PAGES_PER_BLOCK + 7);
}

#[test]
fn dear_bytes_keep_a_block_in_pages_and_dear_faults_open_it_whole() {
    let half = PAGES_PER_BLOCK / 2;
    let policy = |fault, mebibyte| {
        Policy::Cost(Costs {
            fault: Duration::from_micros(fault),
            mebibyte: Duration::from_micros(mebibyte),
        })
    };
    let whole = |policy| {
        let (machine, tracker) = armed(1, policy);
        interval(&machine, &tracker, half);
        tracker.whole_blocks()
    };
    assert_eq!(whole(policy(5, 10_000)), 0);
    assert_eq!(whole(policy(50, 100)), 1);
}

#[test]
fn absurd_costs_are_no_trouble() {
    for (fault, mebibyte) in [
        (Duration::MAX, Duration::ZERO),
        (Duration::ZERO, Duration::MAX),
        (Duration::MAX, Duration::MAX),
    ] {
        let (machine, tracker) = armed(1, Policy::Cost(Costs { fault, mebibyte }));
        for _ in 0..5 {
            interval(&machine, &tracker, 3);
        }
    }
}

#[test]
fn costs_are_medians_of_what_is_timed() {
    let millisecond = Duration::from_millis(1);
    let (mut faults, mut writes) = (0, 0);
    let fault = || {
        faults += 1;
        std::thread::sleep(millisecond);
        Ok::<(), ()>(())
    };
    let write = || {
        writes += 1;
        std::thread::sleep(millisecond);
        Ok(1 << 10)
    };
    let costs = Costs::measure(fault, write).unwrap();
    assert!(costs.fault >= millisecond, "{costs:?}");
    assert!(costs.mebibyte >= 1024 * millisecond, "{costs:?}");
    assert!(
        faults % 2 == 1 && writes % 2 == 1,
        "no median of {faults}, {writes}"
    );
    // So many MiB that the time of one is none, however long the call takes.
    let costs = Costs::measure(|| Ok::<(), ()>(()), || Ok(1 << 60)).unwrap();
    assert!(costs.mebibyte < millisecond, "{costs:?}");
    assert_eq!(Costs::measure(|| Err("no"), || Ok(1)), Err("no"));
}

#[test]
fn a_fault_outside_the_ram_is_refused_and_opens_nothing() {
    let (machine, tracker) = armed(1, Policy::Blocks);
    for address in [0, START - 1, START + BLOCK_SIZE, u64::MAX] {
        let refused = tracker.on_write_fault(address, &machine);
        assert!(matches!(refused, Err(FaultError::OutOfRange(_))));
    }
    assert_eq!(machine.calls(), []);
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn a_second_checkpoint_while_a_save_is_under_way_is_refused_and_takes_nothing() {
    let (machine, tracker) = armed(1, Policy::Pages);
    let epoch = tracker.arm(&machine).unwrap();
    machine.write(&tracker, 3, 1);
    machine.calls();
    let second = tracker.arm(&machine);
    assert!(matches!(
        second,
        Err(ArmError::Epoch(BeginEpochError::AlreadyOpen))
    ));
    assert_eq!(machine.calls(), []);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&machine, &tracker), [3..4]);
}

#[test]
fn a_failed_save_gives_its_marks_back_and_the_next_protects_them_again() {
    let (machine, tracker) = armed(1, Policy::Pages);
    machine.write(&tracker, 3, 1);
    drop(tracker.arm(&machine).unwrap());
    machine.write(&tracker, 5, 1);
    machine.calls();
    assert_eq!(checkpoint(&machine, &tracker), [3..4, 5..6]);
    let at = |page: u64| START + page * PAGE;
    assert_eq!(machine.calls(), [Call::Protect(at(3)..at(6))]);
}

#[test]
fn what_could_not_be_protected_counts_as_dirty() {
    let (machine, tracker) = armed(1, Policy::Pages);
    for page in [0, 1, 120, 121] {
        machine.write(&tracker, page, 1);
    }
    // The second call fails half-way, and so does protecting all.
    machine.patience.store(1, Ordering::SeqCst);
    let failed = tracker.arm(&machine);
    assert!(matches!(failed, Err(ArmError::Protect { .. })));
    machine.patience.store(u64::MAX, Ordering::SeqCst);
    // Page 121 was open all the time.
    assert_eq!(machine.write(&tracker, 121, 2), 0);
    assert_eq!(checkpoint(&machine, &tracker), [0..2, 120..122]);
    assert_eq!(machine.write(&tracker, 121, 3), 1);
}

#[test]
fn what_could_not_be_protected_in_the_middle_of_a_save_is_dirty_for_the_next() {
    let (machine, tracker) = armed(1, Policy::Pages);
    let mut epoch = tracker.arm(&machine).unwrap();
    machine.write(&tracker, 60, 1);
    machine.patience.store(0, Ordering::SeqCst);
    let failed = tracker.arm_more(&mut epoch, &machine);
    assert!(matches!(failed, Err(ArmError::Protect { .. })));
    machine.patience.store(u64::MAX, Ordering::SeqCst);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&machine, &tracker), [60..61]);
}

#[test]
fn where_many_pieces_can_not_be_protected_all_of_the_ram_is() {
    let (machine, tracker) = armed(2, Policy::Pages);
    machine.write(&tracker, 60, 1);
    machine.calls();
    let refuse_once = Refusing(
        &machine,
        |call: &Call| matches!(call, Call::Protect(range) if range.end - range.start < BLOCK_SIZE),
    );
    tracker.arm(&refuse_once).unwrap().release().unwrap();
    assert_eq!(
        machine.calls(),
        [Call::Protect(START..START + 2 * BLOCK_SIZE)]
    );
}

#[test]
fn where_a_page_can_not_be_opened_its_block_is_and_then_all_of_the_ram() {
    for (smallest, pages) in [
        (BLOCK_SIZE, 0..PAGES_PER_BLOCK),
        (2 * BLOCK_SIZE, 0..2 * PAGES_PER_BLOCK),
    ] {
        let (machine, tracker) = armed(2, Policy::Pages);
        let refusing = Refusing(
            &machine,
            |call: &Call| matches!(call, Call::Lift(range) if range.end - range.start < smallest),
        );
        tracker.on_write_fault(START + 9 * PAGE, &refusing).unwrap();
        assert_eq!(checkpoint(&machine, &tracker), [pages]);
    }
}

#[test]
fn what_could_not_be_opened_for_sure_counts_as_dirty() {
    let (machine, tracker) = armed(1, Policy::Blocks);
    machine.patience.store(0, Ordering::SeqCst);
    let failed = tracker.on_write_fault(START + 9 * PAGE, &machine);
    assert!(
        matches!(failed, Err(FaultError::Lift { range, .. }) if range == (START..START + BLOCK_SIZE))
    );
    machine.patience.store(u64::MAX, Ordering::SeqCst);
    // Half of it is open: no fault will tell.
    assert_eq!(machine.write(&tracker, 1, 1), 0);
    assert_eq!(checkpoint(&machine, &tracker), [0..PAGES_PER_BLOCK]);
}

#[rstest]
#[case::pages_larger_than_a_block(0, 8 << 20, 4 << 20, "at most 2097152")]
#[case::ram_that_begins_within_a_page(4096, 1 << 20, 16384, "no whole number of pages")]
#[case::ram_that_ends_within_a_page(0, (1 << 20) + 4096, 16384, "no whole number of pages")]
fn ram_that_can_not_be_protected_is_refused(
    #[case] start: u64,
    #[case] size: u64,
    #[case] page: u64,
    #[case] says: &str,
) {
    let bitmap = Arc::new(TrackedBitmap::tracked(start, size, page).unwrap());
    let refused: TrackerError = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages).unwrap_err();
    assert!(refused.to_string().contains(says), "{refused}");
    assert!(bitmap.is_clean());
}

/// A platform that refuses some calls, without effect.
struct Refusing<'a, F>(&'a Machine, F);

impl<F: Fn(&Call) -> bool> Refusing<'_, F> {
    fn check(&self, call: Call) -> std::io::Result<()> {
        match self.1(&call) {
            true => Err(std::io::ErrorKind::OutOfMemory.into()),
            false => Ok(()),
        }
    }
}

impl<F: Fn(&Call) -> bool> dirty_bitmap::WriteProtection for Refusing<'_, F> {
    type Error = std::io::Error;

    fn protect(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        self.check(Call::Protect(range.clone()))?;
        self.0.protect(range)
    }

    fn lift(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        self.check(Call::Lift(range.clone()))?;
        self.0.lift(range)
    }
}

#[test]
fn a_bitmap_has_one_tracker_at_a_time() {
    let (_machine, tracker) = armed(1, Policy::Pages);
    let bitmap = Arc::clone(tracker.bitmap());
    let second = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages);
    assert_eq!(second.unwrap_err(), TrackerError::AlreadyTracked);
    assert!(bitmap.is_clean(), "nothing was marked");
    drop(tracker);
    let second = WriteTracker::new(Arc::clone(&bitmap), Policy::Pages).unwrap();
    assert_eq!(bitmap.dirty_bytes(), BLOCK_SIZE);
    drop(second);
}

#[test]
fn the_epoch_of_another_tracker_is_refused() {
    let (machine, tracker) = armed(1, Policy::Pages);
    let (other_machine, other) = armed(1, Policy::Pages);
    let mut epoch = other.arm(&other_machine).unwrap();
    other_machine.write(&other, 3, 1);
    let refused = tracker.arm_more(&mut epoch, &machine);
    assert!(matches!(refused, Err(ArmError::OtherBitmap)));
    // It took nothing: written again, the page is in the next checkpoint still.
    other_machine.write(&other, 3, 2);
    epoch.release().unwrap();
    assert_eq!(checkpoint(&other_machine, &other), [3..4]);
}

#[test]
fn a_reclaimed_checkpoint_is_taken_and_protected_again() {
    let (machine, tracker) = armed(1, Policy::Pages);
    machine.write(&tracker, 3, 1);
    let mut stuck = tracker.arm(&machine).unwrap();
    assert!(tracker.reclaim_epoch().unwrap());
    machine.write(&tracker, 5, 1);
    machine.calls();
    let more = tracker.arm_more(&mut stuck, &machine);
    let reclaimed = matches!(more, Err(ArmError::More(TakeMoreError::Reclaimed(_))));
    assert!(reclaimed);
    assert_eq!(machine.calls(), []);
    assert_eq!(checkpoint(&machine, &tracker), [3..4, 5..6]);
    let at = |page: u64| START + page * PAGE;
    assert_eq!(machine.calls(), [Call::Protect(at(3)..at(6))]);
    assert!(stuck.release().is_err());
}
