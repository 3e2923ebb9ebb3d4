//! Failures of the write protection, and faults that race with checkpoints.

#![allow(clippy::missing_panics_doc, reason = "a panic is a failed test")]

use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use dirty_bitmap::{BLOCK_SIZE, Policy};
use hvf_backend::{Stage2CheckpointError, Stage2FaultError};
use test_machine::rounds;

use crate::backend::{Backend, HIGH, LOW_SIZE};
use crate::images::saved_whole;
use crate::machine::Machine;

/// Checks that no page is lost when the protection of a checkpoint fails half-way: of the first of
/// a save, or of one that extends it.
pub fn partly_failed_protection<B: Backend>(extends: bool) {
    let test = "a_partly_failed_protection_loses_no_page";
    let Some(machine) = Machine::<B>::new(4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = &machine.pages();
    let protection = machine.tracker.protection();
    for round in 0..rounds(1, 4) {
        let sparse = |step: usize| move |_: usize| pages_of(pages, step);
        machine.all_write(sparse(3));
        let before: Vec<_> = machine.bitmap().runs().collect();

        // Both the call and the retry for all of the RAM fail.
        let error = if extends {
            let mut epoch = machine.checkpoint().unwrap();
            machine.all_write(sparse(2));
            let dirty: Vec<_> = machine.bitmap().runs().collect();
            protection.refuse_protect.store(2, SeqCst);
            let error = machine.checkpoint_final(&mut epoch).unwrap_err();
            let still: Vec<_> = machine.bitmap().runs().collect();
            assert_eq!(still, dirty, "pages that are not protected are dirty");
            error
        } else {
            protection.refuse_protect.store(2, SeqCst);
            machine.checkpoint().unwrap_err()
        };
        let message = error.to_string();
        assert!(message.contains("its pages stay dirty"), "{message}");
        let Some(dirty_bitmap::CheckpointError::Protect { .. }) = tracker_error(&error) else {
            panic!("{error:?}");
        };
        let covered = |run: &std::ops::Range<u64>| {
            let page = machine.bitmap().page_size() as usize;
            let mut all = (run.start..run.end).step_by(page);
            all.all(|at| machine.bitmap().is_dirty(at).unwrap())
        };
        assert!(before.iter().all(covered), "all marks are in the bitmap");

        machine.all_write(sparse(4));
        let epoch = machine.checkpoint().unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}"));
        machine.all_write(sparse(5));
        let epoch = machine.checkpoint().unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}, after another turn"));
    }
}

fn pages_of(pages: &[u64], step: usize) -> Vec<u64> {
    pages.iter().step_by(step).copied().collect()
}

fn tracker_error(
    error: &Stage2CheckpointError<io::Error>,
) -> Option<&dirty_bitmap::CheckpointError<io::Error>> {
    match error {
        Stage2CheckpointError::Tracker(error) => Some(error),
        _ => None,
    }
}

/// Checks that a page that can't be unprotected alone is unprotected and marked with its block.
pub fn refused_page<B: Backend>() {
    let test = "a_refused_page_is_unprotected_with_its_block";
    let Some(machine) = Machine::<B>::new(4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let protection = machine.tracker.protection();
    protection.refuse_unprotect.store(1, SeqCst);
    machine.write_pages(0, [HIGH + 0x3000]);
    machine.wait_until_marked();
    let block = machine.offset_of(HIGH) / BLOCK_SIZE * BLOCK_SIZE;
    let end = (block + BLOCK_SIZE).min(machine.layout().ram_size());
    for offset in (block..end).step_by(4096) {
        assert!(machine.bitmap().is_dirty(offset).unwrap(), "{offset:#x}");
    }
    let epoch = machine.checkpoint().unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");

    protection.refuse_unprotect.store(3, SeqCst);
    let error = machine.tracker.on_write_fault(HIGH + 0x7000).unwrap_err();
    assert!(matches!(error, Stage2FaultError::Tracker(_)), "{error:?}");
    assert!(error.to_string().contains("failed to unprotect"), "{error}");
    assert!(
        machine.is_dirty(HIGH + 0x7000),
        "pages that may be unprotected are dirty"
    );
}

/// Checks that a block on both sides of a gap in guest-physical memory is unprotected as a whole.
pub fn block_across_a_gap<B: Backend>() {
    let test = "a_fault_unprotects_a_block_on_both_sides_of_a_gap";
    let Some(machine) = Machine::<B>::new(4096, Policy::Blocks, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let protection = machine.tracker.protection();
    let (last, first) = (LOW_SIZE - 4096, HIGH);
    machine.write_pages(0, [last]);
    machine.wait_until_marked();
    let half = BLOCK_SIZE / 2;
    assert!(machine.is_dirty(first), "the same block");
    assert!(machine.is_dirty(first + half - 1) && !machine.is_dirty(first + half));
    assert!(machine.is_dirty(last - half + 4096) && !machine.is_dirty(last - half));
    // The other side of the gap is unprotected too, so this write does not fault.
    protection.refuse_unprotect.store(9, SeqCst);
    machine.write_pages(1, [first]);
    assert_eq!(protection.refuse_unprotect.swap(0, SeqCst), 9);
    let epoch = machine.checkpoint().unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");
}

/// Checks that a stopped guest has no checkpoint between the unprotecting of a page and its mark.
pub fn checkpoint_during_a_fault<B: Backend>() {
    let test = "a_checkpoint_is_refused_while_a_fault_is_being_handled";
    let Some(machine) = Machine::<B>::new(4096, Policy::Blocks, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let hold = &machine.tracker.protection().hold_unprotect;
    let (unmarked, checkpoint) = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(HIGH));
        // The handling of an exit. Its vCPU does not count as running.
        let handling = scope.spawn(|| machine.tracker.on_write_fault(HIGH).unwrap());
        held.wait_until_held();
        machine.write_pages(1, [HIGH + 0x5000]);
        let seen = (
            !machine.is_dirty(HIGH + 0x5000),
            machine.tracker.checkpoint(),
        );
        drop(held);
        handling.join().unwrap();
        seen
    });
    assert!(unmarked);
    let refused = Stage2CheckpointError::<io::Error>::VcpuRunning { running: 1 };
    assert_eq!(checkpoint.unwrap_err().to_string(), refused.to_string());
    let epoch = machine.checkpoint().unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");
}

/// Checks that a write that follows the protection of its page at once is marked again.
pub fn write_after_protection<B: Backend>(extends: bool) {
    let test = "a_write_right_after_protection_is_marked_again";
    let Some(machine) = Machine::<B>::new(4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let page = HIGH + 0x5000;
    let hold = &machine.tracker.protection().hold_protect;
    let mut begun = extends.then(|| machine.tracker.checkpoint_live().unwrap());
    machine.write_pages(0, [page]);
    // A writer that the kernel wakes for another reason resumes as soon as the page is unprotected.
    machine.wait_until_marked();
    let epoch = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(page));
        let checkpoint = scope.spawn(|| match begun.take() {
            None => machine.tracker.checkpoint_live().unwrap(),
            Some(mut epoch) => {
                let _ = machine.tracker.checkpoint_incremental(&mut epoch).unwrap();
                epoch
            }
        });
        held.wait_until_held();
        machine.write_pages(1, [page]);
        drop(held);
        checkpoint.join().unwrap()
    });
    machine.wait_until_marked();
    assert!(machine.is_dirty(page), "the page is unprotected");
    images.save(&machine, epoch);
    machine.write_pages(2, [page]);
    images.save(&machine, machine.checkpoint().unwrap());
    images.assert_same_as(&machine, "last save");
}

/// Checks that a checkpoint of a stopped guest is refused while a vCPU runs.
pub fn checkpoint_while_a_vcpu_runs<B: Backend>() {
    let test = "a_stopped_checkpoint_is_refused_while_a_vcpu_runs";
    let Some(machine) = Machine::<B>::new(4096, Policy::Pages, test) else {
        return;
    };
    let run_guard = machine.tracker.enter();
    let error = machine.tracker.checkpoint().unwrap_err();
    assert!(error.to_string().contains("stop them first"), "{error}");
    assert_eq!(machine.bitmap().dirty_bytes(), machine.layout().ram_size());

    let mut epoch = machine.tracker.checkpoint_live().unwrap();
    machine.tracker.checkpoint_final(&mut epoch).unwrap_err();
    let _ = machine.tracker.checkpoint_incremental(&mut epoch).unwrap();
    drop(run_guard);
    let _ = machine.tracker.checkpoint_final(&mut epoch).unwrap();
    let error = machine.tracker.checkpoint().unwrap_err();
    let Some(dirty_bitmap::CheckpointError::Epoch(open)) = tracker_error(&error) else {
        panic!("{error:?}");
    };
    assert_eq!(*open, dirty_bitmap::BeginEpochError::AlreadyOpen);
    epoch.release().unwrap();
    machine.tracker.checkpoint().unwrap().release().unwrap();
}
