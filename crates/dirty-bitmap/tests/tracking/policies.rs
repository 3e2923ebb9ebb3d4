//! The adaptive policy: convergence to pages or blocks, samples, sweeps and costs.

use std::time::Duration;

use dirty_bitmap::{Costs, Policy, WriteTracker};

use crate::machine::{Machine, PAGES_PER_BLOCK, checkpoint, protected};

/// Writes the first `pages` pages of block 0 and makes a checkpoint. Returns the numbers of faults
/// and of marked pages.
fn interval(machine: &Machine, tracker: &WriteTracker, pages: u64) -> (u64, u64) {
    // Not in sequence, which would be a sweep.
    let spread = (0..PAGES_PER_BLOCK).map(|page| page * 37 % PAGES_PER_BLOCK);
    let spread = spread.filter(|page| *page < pages);
    let faults = spread.map(|page| machine.write(tracker, page, 1)).sum();
    let marked = checkpoint(machine, tracker);
    (faults, marked.iter().map(|run| run.end - run.start).sum())
}

#[test]
fn a_densely_written_block_converges_to_one_fault() {
    let (machine, tracker) = protected(1, Policy::default());
    let faults = || interval(&machine, &tracker, PAGES_PER_BLOCK).0;
    assert_eq!(faults(), PAGES_PER_BLOCK);
    // The faults before the block is unprotected, and those in the sample, which is a sixteenth of
    // the block.
    for before in [8, 4, 2] {
        let faults = faults();
        assert!((before..=before + 8).contains(&faults), "{faults}");
    }
    // Afterwards one fault, and occasional samples.
    let later: Vec<u64> = (0..32).map(|_| faults()).collect();
    assert_eq!(later.iter().filter(|faults| **faults == 1).count(), 28);
    assert!(later.iter().all(|faults| *faults <= 9), "{later:?}");
}

#[test]
fn a_sparsely_written_block_stays_in_pages() {
    let (machine, tracker) = protected(1, Policy::default());
    for _ in 0..20 {
        assert_eq!(interval(&machine, &tracker, 9), (9, 9));
    }
}

#[test]
fn a_sparsely_written_last_block_stays_in_pages() {
    let (machine, tracker) = protected(4, Policy::default());
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
fn a_block_returns_to_pages_when_writes_become_sparse() {
    let (machine, tracker) = protected(1, Policy::default());
    for _ in 0..40 {
        interval(&machine, &tracker, PAGES_PER_BLOCK);
    }
    assert_eq!(tracker.whole_blocks(), 1);
    let dirty: Vec<u64> = (0..40).map(|_| interval(&machine, &tracker, 2).1).collect();
    // The change takes effect after one or two samples.
    let changed = dirty.iter().position(|pages| *pages == 2);
    assert!(changed.is_some_and(|at| at < 20), "{dirty:?}");
    assert!(dirty[20..].iter().all(|pages| *pages == 2), "{dirty:?}");
    assert_eq!(tracker.whole_blocks(), 0);
}

#[test]
fn a_single_write_after_a_dense_interval_unprotects_a_page() {
    let (machine, tracker) = protected(1, Policy::default());
    interval(&machine, &tracker, PAGES_PER_BLOCK);
    assert_eq!(tracker.whole_blocks(), 1);
    assert_eq!(interval(&machine, &tracker, 1), (1, 1));
}

/// The guest may write the pages of the sample and no others.
#[test]
fn faults_in_a_sample_alone_keep_a_block_in_pages() {
    let (machine, tracker) = protected(1, Policy::default());
    for _ in 0..64 {
        assert_eq!(interval(&machine, &tracker, 8), (8, 8));
    }
}

#[test]
fn a_sweep_takes_one_fault_per_block_after_the_first() {
    let (machine, tracker) = protected(8, Policy::default());
    let faults: u64 = (0..8 * PAGES_PER_BLOCK)
        .map(|page| machine.write(&tracker, page, 1))
        .sum();
    assert_eq!(faults, PAGES_PER_BLOCK + 7);

    let (machine, tracker) = protected(8, Policy::default());
    let down = (0..8 * PAGES_PER_BLOCK).rev();
    let faults: u64 = down.map(|page| machine.write(&tracker, page, 1)).sum();
    assert_eq!(faults, PAGES_PER_BLOCK + 7);
}

#[test]
fn the_costs_decide_between_pages_and_the_block() {
    let half = PAGES_PER_BLOCK / 2;
    let policy = |fault, write_mib| {
        Policy::Cost(Costs {
            fault: Duration::from_micros(fault),
            write_mib: Duration::from_micros(write_mib),
        })
    };
    let whole = |policy| {
        let (machine, tracker) = protected(1, policy);
        interval(&machine, &tracker, half);
        tracker.whole_blocks()
    };
    assert_eq!(whole(policy(5, 10_000)), 0);
    assert_eq!(whole(policy(50, 100)), 1);
}

#[test]
fn extreme_costs_do_not_overflow() {
    for (fault, write_mib) in [
        (Duration::MAX, Duration::ZERO),
        (Duration::ZERO, Duration::MAX),
        (Duration::MAX, Duration::MAX),
    ] {
        let (machine, tracker) = protected(1, Policy::Cost(Costs { fault, write_mib }));
        for _ in 0..5 {
            interval(&machine, &tracker, 3);
        }
    }
}

#[test]
fn measured_costs_are_medians() {
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
    assert!(costs.write_mib >= 1024 * millisecond, "{costs:?}");
    assert!(
        faults % 2 == 1 && writes % 2 == 1,
        "even numbers have no middle: {faults}, {writes}"
    );
    // For a huge number of bytes, the time for 1 MiB is almost 0, however long the call takes.
    let costs = Costs::measure(|| Ok::<(), ()>(()), || Ok(1 << 60)).unwrap();
    assert!(costs.write_mib < millisecond, "{costs:?}");
    assert_eq!(Costs::measure(|| Err("no"), || Ok(1)), Err("no"));
}
