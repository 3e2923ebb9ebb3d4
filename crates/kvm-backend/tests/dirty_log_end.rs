//! The start and the end of a dirty log: all of the RAM is marked unless the log stayed on.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::sync::Arc;

use dirty_bitmap::LoggedBitmap;
use kvm_backend::{DirtyLog, RamSlots, Reprotect, SlotError, StartError};
use rstest::rstest;
use support::dirty_pages::{TOUCHED, drain, logged, pages, pages_of};
use support::{Guest, HIGH_SIZE, LOW_SIZE};
use test_machine::needs;

#[test]
fn log_started_again_has_the_writes_since_its_drop() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    drop(guest.log(Reprotect::WhenRead));
    guest.touch(&TOUCHED);
    let log = DirtyLog::options()
        .reprotect(Reprotect::WhenRead)
        .start(&guest.slots)
        .unwrap();
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
}

#[test]
fn stopped_log_logs_nothing() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    guest.log(Reprotect::WhenRead).stop().unwrap();
    assert!(guest.vm.get_dirty_log(0, LOW_SIZE as usize).is_err());
    guest.touch(&TOUCHED);
    let log = guest.log(Reprotect::WhenRead);
    assert!(pages(&logged(&guest, &log)).is_empty());
}

#[test]
fn start_marks_all_ram_unless_the_log_stayed_on() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    let all = |marks: &Arc<LoggedBitmap>| drain(marks).dirty_bytes() == LOW_SIZE + HIGH_SIZE;
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(all(&marks), "the first log");
    drop(log);
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(!all(&marks), "it was on all the time");
    log.stop().unwrap();
    guest.touch(&TOUCHED);
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(all(&marks), "a log after one that was stopped");
    drop(log);
    // Of slots that belong to the caller it is not known that the log has stayed on.
    let guest = Guest::touching_adopted(&[0, 1]);
    for _ in 0..2 {
        drop(DirtyLog::start(&guest.slots).unwrap());
        assert!(all(guest.ram.dirty_bitmap()), "of slots of the caller");
    }
}

/// The way in which a log ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Stop,
    StopThenWrite,
    DropWithSlots,
    AdoptedStop,
    AdoptedDrop,
}

#[rstest]
fn pages_of_a_log_that_ends_are_marked(
    #[values(
        End::Stop,
        End::StopThenWrite,
        End::DropWithSlots,
        End::AdoptedStop,
        End::AdoptedDrop
    )]
    end: End,
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = match end {
        End::AdoptedStop | End::AdoptedDrop => Guest::touching_adopted(&[0, 1]),
        End::Stop | End::StopThenWrite | End::DropWithSlots => Guest::touching(),
    };
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    let start = |slots: &Arc<RamSlots>| {
        let log = DirtyLog::options()
            .reprotect(reprotect)
            .start(slots)
            .unwrap();
        log.harvest_live().unwrap();
        drop(drain(&marks));
        log
    };
    match end {
        End::Stop => {
            let log = start(&guest.slots);
            guest.touch(&TOUCHED);
            log.stop().unwrap();
        }
        End::StopThenWrite => {
            start(&guest.slots).stop().unwrap();
            drop(drain(&marks));
            guest.touch(&TOUCHED);
            drop(guest.slots);
        }
        End::DropWithSlots => {
            let log = start(&guest.slots);
            guest.touch(&TOUCHED);
            drop(log);
            let marked = pages(&drain(&marks));
            let touched = pages_of(&TOUCHED);
            assert!(marked.is_disjoint(&touched), "the log is on, and has them");
            drop(guest.slots);
        }
        End::AdoptedStop | End::AdoptedDrop => {
            let log = start(&guest.slots);
            guest.touch(&TOUCHED);
            match end {
                End::AdoptedStop => log.stop().unwrap(),
                _ => drop((log, guest.slots)),
            }
        }
    }
    let marked = pages(&drain(&marks));
    assert!(marked.is_superset(&pages_of(&TOUCHED)));
}

#[test]
fn dropping_slots_that_were_never_logged_marks_nothing() {
    needs!(Kvm);
    let guest = Guest::new();
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    drop(drain(&marks));
    drop(guest.slots);
    assert!(marks.is_clean());
}

#[test]
fn second_registration_is_refused_and_the_log_keeps_its_pages() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    guest.touch(&TOUCHED);
    for first_slot in [0, 8] {
        let again = RamSlots::register(&guest.vm, &guest.ram, first_slot);
        match first_slot {
            0 => assert!(matches!(again, Err(SlotError::InUse { slot: 0 }))),
            _ => assert!(matches!(again, Err(SlotError::AlreadyRegistered))),
        }
    }
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
    // The RAM can be registered again once its slots are removed.
    drop(log);
    drop(guest.slots);
    drop(RamSlots::register(&guest.vm, &guest.ram, 0).unwrap());
}

/// Two logs would take pages from each other.
#[test]
fn second_log_of_the_same_ram_is_refused() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    let second = DirtyLog::start(&guest.slots);
    assert!(matches!(second, Err(StartError::AlreadyStarted)));
    guest.touch(&TOUCHED);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
    drop(log);
    let _ = DirtyLog::start(&guest.slots).unwrap();
}
