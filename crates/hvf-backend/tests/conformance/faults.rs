//! Failures of the write protection, and faults that race with checkpoints.

use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use dirty_bitmap::{BLOCK_SIZE, Policy};
use hvf_backend::{ArmError, FaultError};
use rstest::rstest;
use test_machine::rounds;

use crate::images::saved_whole;
use crate::machine::{HIGH, Kind, LOW_SIZE, Machine};
use crate::{all_write, arm, arm_last};

#[rstest]
fn a_partly_failed_protection_loses_no_page(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
    #[values(false, true)] more: bool,
) {
    let test = "a_partly_failed_protection_loses_no_page";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let pages = &machine.pages();
    let protection = machine.tracker.protection();
    for round in 0..rounds(1, 4) {
        let sparse = |step: usize| move |_: usize| pages_of(pages, step);
        all_write(&machine, sparse(3));
        let before: Vec<_> = machine.bitmap().runs().collect();

        // Both the call and the retry for all of the RAM fail.
        let error = if more {
            let mut epoch = arm(&machine).unwrap();
            all_write(&machine, sparse(2));
            let dirty: Vec<_> = machine.bitmap().runs().collect();
            protection.refuse_protect.store(2, SeqCst);
            let error = arm_last(&machine, &mut epoch).unwrap_err();
            let still: Vec<_> = machine.bitmap().runs().collect();
            assert_eq!(still, dirty, "pages that are not protected are dirty");
            error
        } else {
            protection.refuse_protect.store(2, SeqCst);
            arm(&machine).unwrap_err()
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

        all_write(&machine, sparse(4));
        let epoch = arm(&machine).unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}"));
        all_write(&machine, sparse(5));
        let epoch = arm(&machine).unwrap();
        images.save(&machine, epoch);
        images.assert_same_as(&machine, &format!("round {round}, after another turn"));
    }
}

fn pages_of(pages: &[u64], step: usize) -> Vec<u64> {
    pages.iter().step_by(step).copied().collect()
}

fn tracker_error(error: &ArmError<io::Error>) -> Option<&dirty_bitmap::CheckpointError<io::Error>> {
    match error {
        ArmError::Tracker(error) => Some(error),
        _ => None,
    }
}

#[rstest]
fn a_refused_page_is_unprotected_with_its_block(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
) {
    let test = "a_refused_page_is_unprotected_with_its_block";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let protection = machine.tracker.protection();
    protection.refuse_lift.store(1, SeqCst);
    machine.write_pages(0, [HIGH + 0x3000]);
    machine.wait_until_marked();
    let block = machine.offset_of(HIGH) / BLOCK_SIZE * BLOCK_SIZE;
    let end = (block + BLOCK_SIZE).min(machine.layout().ram_size());
    for offset in (block..end).step_by(4096) {
        assert!(machine.bitmap().is_dirty(offset).unwrap(), "{offset:#x}");
    }
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");

    protection.refuse_lift.store(3, SeqCst);
    let error = machine.tracker.on_write_fault(HIGH + 0x7000).unwrap_err();
    assert!(matches!(error, FaultError::Tracker(_)), "{error:?}");
    assert!(error.to_string().contains("failed to unprotect"), "{error}");
    assert!(
        machine.is_dirty(HIGH + 0x7000),
        "pages that may be unprotected are dirty"
    );
}

#[rstest]
fn a_fault_unprotects_a_block_on_both_sides_of_a_gap(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
) {
    let test = "a_fault_unprotects_a_block_on_both_sides_of_a_gap";
    let Some(machine) = Machine::new(kind, 4096, Policy::Blocks, test) else {
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
    protection.refuse_lift.store(9, SeqCst);
    machine.write_pages(1, [first]);
    assert_eq!(protection.refuse_lift.swap(0, SeqCst), 9);
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");
}

#[rstest]
fn a_checkpoint_is_refused_while_a_fault_is_being_handled(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
) {
    let test = "a_checkpoint_is_refused_while_a_fault_is_being_handled";
    let Some(machine) = Machine::new(kind, 4096, Policy::Blocks, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let hold = &machine.tracker.protection().hold_lift;
    let (unmarked, checkpoint) = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(HIGH));
        // The handling of an exit. Its vCPU does not count as running.
        let handling = scope.spawn(|| machine.tracker.on_write_fault(HIGH).unwrap());
        held.wait_until_held();
        machine.write_pages(1, [HIGH + 0x5000]);
        let seen = (!machine.is_dirty(HIGH + 0x5000), machine.tracker.arm());
        drop(held);
        handling.join().unwrap();
        seen
    });
    assert!(unmarked);
    let refused = ArmError::<io::Error>::VcpuRunning { running: 1 };
    assert_eq!(checkpoint.unwrap_err().to_string(), refused.to_string());
    let epoch = arm(&machine).unwrap();
    images.save(&machine, epoch);
    images.assert_same_as(&machine, "last save");
}

#[rstest]
fn a_write_right_after_protection_is_marked_again(
    #[values(Kind::Mprotect, Kind::Userfaultfd, Kind::KvmUserfaultfd)] kind: Kind,
    #[values(false, true)] more: bool,
) {
    let test = "a_write_right_after_protection_is_marked_again";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let mut images = saved_whole(&machine);
    let page = HIGH + 0x5000;
    let hold = &machine.tracker.protection().hold_protect;
    let mut begun = more.then(|| machine.tracker.arm_running().unwrap());
    machine.write_pages(0, [page]);
    // A writer that the kernel wakes for another reason resumes as soon as the page is unprotected.
    machine.wait_until_marked();
    let epoch = thread::scope(|scope| {
        let held = hold.next_call_for(machine.offset_of(page));
        let checkpoint = scope.spawn(|| match begun.take() {
            None => machine.tracker.arm_running().unwrap(),
            Some(mut epoch) => {
                machine.tracker.arm_more(&mut epoch).unwrap();
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
    images.save(&machine, arm(&machine).unwrap());
    images.assert_same_as(&machine, "last save");
}

#[rstest]
fn a_stopped_checkpoint_is_refused_while_a_vcpu_runs(
    #[values(
        Kind::Mprotect,
        Kind::Userfaultfd,
        Kind::KvmUserfaultfd,
        Kind::KvmReadOnly
    )]
    kind: Kind,
) {
    let test = "a_stopped_checkpoint_is_refused_while_a_vcpu_runs";
    let Some(machine) = Machine::new(kind, 4096, Policy::Pages, test) else {
        return;
    };
    let in_guest = machine.tracker.enter();
    let error = machine.tracker.arm().unwrap_err();
    assert!(error.to_string().contains("stop them first"), "{error}");
    assert_eq!(machine.bitmap().dirty_bytes(), machine.layout().ram_size());

    let mut epoch = machine.tracker.arm_running().unwrap();
    machine.tracker.arm_last(&mut epoch).unwrap_err();
    machine.tracker.arm_more(&mut epoch).unwrap();
    drop(in_guest);
    machine.tracker.arm_last(&mut epoch).unwrap();
    let error = machine.tracker.arm().unwrap_err();
    let expected = dirty_bitmap::BeginEpochError::AlreadyOpen;
    assert!(
        matches!(tracker_error(&error), Some(dirty_bitmap::CheckpointError::Epoch(open)) if *open == expected),
        "{error:?}"
    );
    epoch.release().unwrap();
    machine.tracker.arm().unwrap().release().unwrap();
}
