//! The dirty log of real guests: exact, and without a lost page.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dirty_bitmap::DirtyBitmap;
use kvm_backend::{DirtyLog, HarvestError, RamSlots, Reprotect, SlotError, StartError};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use page_reader::PageReader;
use rstest::rstest;
use support::{
    CODE, Guest, HIGH, HIGH_SIZE, INPUT, INPUT_SIZE, LOW_SIZE, PAGE, Program, TABLES, offset,
};
use test_machine::{Need, rounds};

/// Pages written in the tests, in both regions, at their borders too.
const TOUCHED: [u64; 7] = [
    0x20000,
    0x21ff8,
    0x100000,
    LOW_SIZE - 8,
    HIGH,
    HIGH + 0x123450,
    HIGH + HIGH_SIZE - 8,
];

/// What the log has, taken out of it, without what the host wrote.
fn logged(guest: &Guest, log: &DirtyLog) -> DirtyBitmap {
    let marks = guest.ram.dirty_bitmap();
    marks.drain().unwrap();
    log.harvest_running().unwrap();
    marks.drain().unwrap()
}

/// The numbers of the pages marked, without those of the page tables, which the processor itself may have written.
fn pages<K>(bitmap: &DirtyBitmap<K>) -> BTreeSet<u64> {
    let tables = TABLES / PAGE..CODE / PAGE;
    bitmap
        .runs()
        .flat_map(|run| run.start / PAGE..run.end.div_ceil(PAGE))
        .filter(|page| !tables.contains(page))
        .collect()
}

fn pages_of(addresses: &[u64]) -> BTreeSet<u64> {
    addresses.iter().map(|a| offset(*a) / PAGE).collect()
}

#[rstest]
fn the_log_has_exactly_the_pages_that_the_guest_wrote_in_both_slots(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    if !Need::Kvm.met("the_log_has_exactly_the_pages_that_the_guest_wrote_in_both_slots") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    assert_eq!(log.reprotect(), reprotect);

    guest.touch(&TOUCHED);
    let marks = guest.ram.dirty_bitmap();
    marks.drain().unwrap();
    let harvest = log.harvest_running().unwrap();
    assert_eq!(pages(marks), pages_of(&TOUCHED));
    assert_eq!(harvest.pages * harvest.page_size, marks.dirty_bytes());

    // Nothing written, nothing found; one page written again, that one found.
    marks.drain().unwrap();
    assert_eq!(log.harvest_running().unwrap().pages, 0);
    assert!(marks.is_clean());
    guest.touch(&TOUCHED[3..4]);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED[3..4]));
}

#[rstest]
#[case::coarser(16384)]
#[case::finer(512)]
fn a_bitmap_of_another_page_size_covers_the_pages_written(#[case] page_size: u64) {
    if !Need::Kvm.met("a_bitmap_of_another_page_size_covers_the_pages_written") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    guest.touch(&TOUCHED);
    guest.ram.dirty_bitmap().rebuild(page_size).unwrap();
    let marks = logged(&guest, &log);
    for page in pages_of(&TOUCHED) {
        assert!(marks.is_dirty(page * PAGE).unwrap());
        assert!(marks.is_dirty(page * PAGE + PAGE - 1).unwrap());
    }
    assert!(!marks.is_dirty(0x80000).unwrap());
}

/// KVM is told to protect a gibibyte at a time, and the last part has an odd number of pages.
#[test]
fn a_slot_of_several_gibibytes_is_logged_and_protected_to_its_end() {
    if !Need::Kvm.met("a_slot_of_several_gibibytes_is_logged_and_protected_to_its_end") {
        return;
    }
    const GIB: u64 = 1 << 30;
    let size = 2 * GIB + 5 * PAGE;
    let mut guest = Guest::with_ram([(0, size)], |_| ());
    guest.boot(Program::Touch);
    let touched = [0x20000, GIB - 8, GIB, 2 * GIB - 8, 2 * GIB, size - 8];
    guest.touch(&touched);
    let log = guest.log(Reprotect::WhenMarked);
    for _ in 0..2 {
        assert_eq!(log.harvest_running().unwrap().pages, 0);
        guest.touch(&touched);
        let written = touched.iter().map(|address| address / PAGE).collect();
        assert_eq!(pages(&logged(&guest, &log)), written);
    }
}

#[rstest]
fn a_save_that_fails_keeps_its_pages_for_the_next_one(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    if !Need::Kvm.met("a_save_that_fails_keeps_its_pages_for_the_next_one") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    let marks = Arc::clone(guest.ram.dirty_bitmap());

    guest.touch(&TOUCHED[..3]);
    log.harvest_running().unwrap();
    let epoch = marks.begin_epoch().unwrap();
    guest.touch(&TOUCHED[2..5]); // while the save is under way
    drop(epoch); // the save fails

    log.harvest_running().unwrap();
    let epoch = marks.begin_epoch().unwrap();
    let list = pages_of(&[INPUT]); // the host's
    assert_eq!(pages(epoch.bitmap()), &pages_of(&TOUCHED[..5]) | &list);
    epoch.release().unwrap();
    log.harvest_running().unwrap();
    assert!(marks.is_clean());
}

#[rstest]
fn a_harvest_that_fails_at_the_second_slot_loses_no_page(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    if !Need::Kvm.met("a_harvest_that_fails_at_the_second_slot_loses_no_page") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    guest.touch(&TOUCHED[..2]);

    log_high_slot(&guest, false);
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    marks.drain().unwrap();
    let error = log.harvest_running().unwrap_err();
    assert!(matches!(error, HarvestError::Get { slot: 1, .. }));
    assert!(error.source().is_some() && error.to_string().contains("slot 1"));
    assert_eq!(pages(&marks), pages_of(&TOUCHED[..2]));

    // While the log is off, and the first slot's is not.
    guest.touch(&TOUCHED[4..]);
    log_high_slot(&guest, true);
    log.harvest_running().unwrap();
    let low = [&TOUCHED[..2], &[INPUT]].concat();
    let high = LOW_SIZE / PAGE..(LOW_SIZE + HIGH_SIZE) / PAGE;
    assert_eq!(pages(&marks), &pages_of(&low) | &high.collect());
    // From here on it is exact again.
    guest.touch(&TOUCHED[5..6]);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED[5..6]));

    // A log that was found off is not continued.
    log_high_slot(&guest, false);
    log.harvest_running().unwrap_err();
    drop(log);
    drop(DirtyLog::start(&guest.slots).unwrap());
    assert_eq!(marks.dirty_bytes(), LOW_SIZE + HIGH_SIZE);
}

/// What a monitor might do behind the log's back.
fn log_high_slot(guest: &Guest, on: bool) {
    let memory = guest.ram.host_memory(LOW_SIZE, 1).unwrap();
    let region = kvm_userspace_memory_region {
        slot: 1,
        flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: HIGH,
        memory_size: HIGH_SIZE,
        userspace_addr: memory.as_ptr().addr() as u64,
    };
    // SAFETY: the slot as it is registered, but for its flags.
    #[allow(unsafe_code)]
    unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
}

#[test]
fn what_the_host_writes_is_marked_beside_what_the_guest_writes() {
    if !Need::Kvm.met("what_the_host_writes_is_marked_beside_what_the_guest_writes") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    guest.touch(&TOUCHED[..1]); // writes its list at INPUT from the host
    guest.ram.write(HIGH + 0x1ffe, &[1; 4]).unwrap(); // across a page border
    guest.ram.write_at(offset(0x80000), &[1]).unwrap();
    guest.ram.mark(0x90000, 1).unwrap(); // a device wrote there

    let marks = guest.ram.dirty_bitmap();
    log.harvest_running().unwrap();
    let written = [
        TOUCHED[0],
        INPUT,
        HIGH + 0x1000,
        HIGH + 0x2000,
        0x80000,
        0x90000,
    ];
    assert_eq!(pages(marks), pages_of(&written));
}

#[test]
fn a_log_dropped_and_started_again_has_what_was_written_in_between() {
    if !Need::Kvm.met("a_log_dropped_and_started_again_has_what_was_written_in_between") {
        return;
    }
    let mut guest = Guest::touching();
    drop(guest.log(Reprotect::WhenRead));
    guest.touch(&TOUCHED);
    let log = DirtyLog::start_with(&guest.slots, Reprotect::WhenRead).unwrap();
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
}

#[test]
fn a_log_stopped_logs_nothing_more() {
    if !Need::Kvm.met("a_log_stopped_logs_nothing_more") {
        return;
    }
    let mut guest = Guest::touching();
    guest.log(Reprotect::WhenRead).stop().unwrap();
    assert!(guest.vm.get_dirty_log(0, LOW_SIZE as usize).is_err());
    guest.touch(&TOUCHED);
    let log = guest.log(Reprotect::WhenRead);
    assert!(pages(&logged(&guest, &log)).is_empty());
}

#[test]
fn what_no_log_has_seen_is_marked_when_one_starts() {
    if !Need::Kvm.met("what_no_log_has_seen_is_marked_when_one_starts") {
        return;
    }
    let mut guest = Guest::touching();
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    let all = |marks: &DirtyBitmap| marks.drain().unwrap().dirty_bytes() == LOW_SIZE + HIGH_SIZE;
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(all(&marks), "the first log");
    drop(log);
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(!all(&marks), "it was on all the time");
    log.stop().unwrap();
    guest.touch(&TOUCHED);
    let log = DirtyLog::start(&guest.slots).unwrap();
    assert!(all(&marks), "a log after one that was stopped");
    // Of slots that are somebody else's it is not known that the log has stayed on.
    drop(log);
    // SAFETY: `guest.slots` are these very slots, and outlive what is made here.
    #[allow(unsafe_code)]
    let adopted = unsafe { RamSlots::adopt(&guest.vm, &guest.ram, 0) }.unwrap();
    let adopted = Arc::new(adopted);
    for _ in 0..2 {
        drop(DirtyLog::start(&adopted).unwrap());
        assert!(all(&marks), "a log of slots that are not its own");
    }
}

/// How a log comes to its end.
#[derive(Clone, Copy, Debug)]
enum End {
    Stop,
    StopThenWrite,
    DropWithSlots,
    AdoptedStop,
    AdoptedDrop,
}

#[rstest]
fn the_pages_of_a_log_that_ends_are_marked(
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
    if !Need::Kvm.met("the_pages_of_a_log_that_ends_are_marked") {
        return;
    }
    let mut guest = Guest::touching();
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    let start = |slots: &Arc<RamSlots>| {
        let log = DirtyLog::start_with(slots, reprotect).unwrap();
        log.harvest_running().unwrap();
        marks.drain().unwrap();
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
            marks.drain().unwrap();
            guest.touch(&TOUCHED);
            drop(guest.slots);
        }
        End::DropWithSlots => {
            let log = start(&guest.slots);
            guest.touch(&TOUCHED);
            drop(log);
            let marked = pages(&marks.drain().unwrap());
            let touched = pages_of(&TOUCHED);
            assert!(marked.is_disjoint(&touched), "the log is on, and has them");
            drop(guest.slots);
        }
        End::AdoptedStop | End::AdoptedDrop => {
            // SAFETY: `guest.slots` are these very slots, and outlive what is made here.
            #[allow(unsafe_code)]
            let adopted = unsafe { RamSlots::adopt(&guest.vm, &guest.ram, 0) }.unwrap();
            let adopted = Arc::new(adopted);
            let log = start(&adopted);
            guest.touch(&TOUCHED);
            match end {
                End::AdoptedStop => log.stop().unwrap(),
                _ => drop(log),
            }
        }
    }
    let marked = pages(&marks.drain().unwrap());
    assert!(marked.is_superset(&pages_of(&TOUCHED)));
}

#[test]
fn slots_that_were_never_logged_end_without_marks() {
    if !Need::Kvm.met("slots_that_were_never_logged_end_without_marks") {
        return;
    }
    let guest = Guest::new();
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    marks.drain().unwrap();
    drop(guest.slots);
    assert!(marks.is_clean());
}

#[test]
fn ram_registered_again_is_refused_and_its_log_keeps_its_pages() {
    if !Need::Kvm.met("ram_registered_again_is_refused_and_its_log_keeps_its_pages") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    guest.touch(&TOUCHED);
    for first_slot in [0, 8] {
        let again = RamSlots::register(&guest.vm, &guest.ram, first_slot);
        assert!(matches!(again, Err(SlotError::AlreadyRegistered)));
    }
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
    // Slots that are gone leave it free.
    drop(log);
    drop(guest.slots);
    drop(RamSlots::register(&guest.vm, &guest.ram, 0).unwrap());
}

/// Two would take pages from each other, from one value of the slots or from two.
#[test]
fn a_second_log_of_the_same_ram_is_refused() {
    if !Need::Kvm.met("a_second_log_of_the_same_ram_is_refused") {
        return;
    }
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    // SAFETY: `guest.slots` are these very slots, and outlive what is made here.
    #[allow(unsafe_code)]
    let adopted = unsafe { RamSlots::adopt(&guest.vm, &guest.ram, 0) }.unwrap();
    for slots in [&guest.slots, &Arc::new(adopted)] {
        let second = DirtyLog::start(slots);
        assert!(matches!(second, Err(StartError::AlreadyStarted)));
    }
    guest.touch(&TOUCHED);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED));
    drop(log);
    DirtyLog::start(&guest.slots).unwrap();
}

/// A guest that writes random pages all the time, harvested meanwhile: the pages copied after each harvest, put together, must
/// be its RAM. With `apart`, another thread takes the marks and copies, so that it may do so in the middle of a harvest.
#[rstest]
fn harvesting_a_running_guest_loses_no_page(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
    #[values(false, true)] apart: bool,
) {
    if !Need::Kvm.met("harvesting_a_running_guest_loses_no_page") {
        return;
    }
    let enough: u64 = rounds(2000, 10_000);
    let mut guest = Guest::booted(Program::Scatter);
    let log = guest.log(reprotect);
    guest.set_regs(|regs| {
        regs.rdi = LOW_SIZE;
        regs.r10 = (LOW_SIZE + HIGH_SIZE) / PAGE - 32;
        regs.r11 = HIGH - LOW_SIZE;
        regs.rdx = INPUT;
    });
    let mut copy = guest.image();
    let (vcpu, ram) = (&mut guest.vcpu, &guest.ram);
    let marks = ram.dirty_bitmap();
    let mut save = || {
        let taken = marks.drain().unwrap();
        for run in taken.runs() {
            let bytes = &mut copy[run.start as usize..run.end as usize];
            ram.read_at(run.start, bytes).unwrap();
        }
    };
    let harvested = AtomicBool::new(false);
    let mut pages = 0;
    std::thread::scope(|threads| {
        let running = threads.spawn(move || support::run(vcpu));
        let more = |pages| pages < enough && !running.is_finished();
        if apart {
            let copier = threads.spawn(|| {
                while !harvested.load(Ordering::Acquire) {
                    save();
                }
            });
            while more(pages) {
                pages += log.harvest_running().unwrap().pages;
            }
            harvested.store(true, Ordering::Release);
            copier.join().unwrap();
        } else {
            while more(pages) {
                pages += log.harvest_running().unwrap().pages;
                save();
            }
        }
        ram.write(INPUT, &[1]).unwrap();
        running.join().unwrap();
    });
    pages += log.harvest_running().unwrap().pages;
    save();
    assert!(pages >= enough, "the guest ended by itself");
    let lost: Vec<_> = std::iter::zip(copy.chunks(4096), guest.image().chunks(4096))
        .enumerate()
        .filter_map(|(page, (copied, real))| (copied != real).then_some(page))
        .collect();
    assert!(lost.is_empty(), "pages {lost:?} of {pages} harvested");
}

/// In the middle of a harvest another thread takes the marks and copies a page, and the guest writes it once more before KVM
/// protects it: of thousands of scattered pages the first is marked long before the last.
#[rstest]
#[case::protected_before_they_are_marked(Reprotect::WhenRead, 2)]
#[case::protected_after(Reprotect::WhenMarked, 20)]
fn a_page_copied_and_written_again_during_a_harvest_is_found_again(
    #[case] reprotect: Reprotect,
    #[case] trials: u32,
) {
    if !Need::Kvm.met("a_page_copied_and_written_again_during_a_harvest_is_found_again") {
        return;
    }
    const RAM: u64 = 64 << 20;
    let mut guest = Guest::with_ram([(0, RAM)], |_| ());
    guest.boot(Program::Touch);
    let scattered: Vec<_> = (0..INPUT_SIZE / 8)
        .map(|i| 0x20000 + i * 2 * PAGE)
        .collect();
    guest.touch(&scattered);
    let log = guest.log(reprotect);
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    for trial in 0..rounds(2, trials) {
        guest.touch(&scattered);
        let copied = std::thread::scope(|threads| {
            let harvest = threads.spawn(|| log.harvest_running().unwrap());
            while !marks.is_dirty(scattered[0]).unwrap() {
                std::hint::spin_loop();
            }
            marks.drain().unwrap();
            let copied = word(&guest, scattered[0]);
            guest.touch(&scattered[..1]);
            harvest.join().unwrap();
            copied
        });
        assert_eq!(word(&guest, scattered[0]), copied + 1);
        log.harvest_running().unwrap();
        let found = marks.drain().unwrap();
        assert!(found.is_dirty(scattered[0]).unwrap(), "trial {trial}");
    }
}

fn word(guest: &Guest, address: u64) -> u64 {
    let mut bytes = [0; 8];
    guest.ram.read(address, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}
