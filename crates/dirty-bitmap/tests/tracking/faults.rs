//! The part of the RAM that a write fault unprotects and marks.

use std::ops::Range;
use std::sync::atomic::Ordering;

use dirty_bitmap::{BLOCK_SIZE, FaultError, Policy};
use rstest::rstest;

use crate::machine::{
    Call, Machine, PAGE, PAGES_PER_BLOCK, Refusing, START, checkpoint, protected,
};

#[rstest]
#[case::a_page(Policy::Pages, 5..6)]
#[case::a_block(Policy::Blocks, 0..PAGES_PER_BLOCK)]
fn a_fault_unprotects_and_marks(#[case] policy: Policy, #[case] pages: Range<u64>) {
    let (machine, tracker) = protected(2, policy);
    let unprotected = tracker
        .on_write_fault(START + 5 * PAGE + 77, &machine)
        .unwrap();
    assert_eq!(
        unprotected,
        START + pages.start * PAGE..START + pages.end * PAGE
    );
    assert_eq!(machine.calls(), [Call::Unprotect(unprotected)]);
    assert_eq!(checkpoint(&machine, &tracker), [pages]);
}

#[test]
fn the_last_block_ends_where_the_ram_ends() {
    let machine = Machine::new(START, PAGES_PER_BLOCK + 3, PAGE);
    let tracker = machine.tracked(Policy::Blocks);
    tracker.checkpoint(&machine).unwrap().release().unwrap();
    machine.write(&tracker, PAGES_PER_BLOCK + 1, 1);
    assert_eq!(
        checkpoint(&machine, &tracker),
        [PAGES_PER_BLOCK..PAGES_PER_BLOCK + 3]
    );
}

#[test]
fn the_fault_past_the_limit_unprotects_the_block() {
    let (machine, tracker) = protected(1, Policy::FaultLimit(4));
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

#[test]
fn a_fault_outside_the_ram_is_an_error_and_has_no_effect() {
    let (machine, tracker) = protected(1, Policy::Blocks);
    for address in [0, START - 1, START + BLOCK_SIZE, u64::MAX] {
        let refused = tracker.on_write_fault(address, &machine);
        assert!(matches!(refused, Err(FaultError::OutOfRange(_))));
    }
    assert_eq!(machine.calls(), []);
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn a_refused_page_unprotects_its_block_or_all_ram() {
    for (smallest, pages) in [
        (BLOCK_SIZE, 0..PAGES_PER_BLOCK),
        (2 * BLOCK_SIZE, 0..2 * PAGES_PER_BLOCK),
    ] {
        let (machine, tracker) = protected(2, Policy::Pages);
        let refusing = Refusing(
            &machine,
            |call: &Call| matches!(call, Call::Unprotect(range) if range.end - range.start < smallest),
        );
        tracker.on_write_fault(START + 9 * PAGE, &refusing).unwrap();
        assert_eq!(checkpoint(&machine, &tracker), [pages]);
    }
}

#[test]
fn pages_of_a_failed_unprotect_are_dirty() {
    let (machine, tracker) = protected(1, Policy::Blocks);
    machine.calls_left.store(0, Ordering::SeqCst);
    let failed = tracker.on_write_fault(START + 9 * PAGE, &machine);
    assert!(
        matches!(failed, Err(FaultError::Unprotect { range, .. }) if range == (START..START + BLOCK_SIZE))
    );
    machine.calls_left.store(u64::MAX, Ordering::SeqCst);
    // Half of the block is unprotected, so a write there causes no fault.
    assert_eq!(machine.write(&tracker, 1, 1), 0);
    assert_eq!(checkpoint(&machine, &tracker), [0..PAGES_PER_BLOCK]);
}
