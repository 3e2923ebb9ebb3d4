//! The dirty log of real guests: it has exactly the written pages, and loses none.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_backend::{DirtyLog, HarvestError, Reprotect};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use page_reader::PageReader;
use rstest::rstest;
use support::dirty_pages::{TOUCHED, drain, logged, pages, pages_of};
use support::{Guest, HIGH, HIGH_SIZE, INPUT, INPUT_SIZE, LOW_SIZE, PAGE, Program, offset};
use test_machine::{needs, rounds};

#[rstest]
fn log_has_exactly_the_written_pages_of_both_slots(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    assert_eq!(log.reprotect(), reprotect);

    guest.touch(&TOUCHED);
    let marks = guest.ram.dirty_bitmap();
    drop(drain(marks));
    let harvest = log.harvest_live().unwrap();
    assert_eq!(pages(marks), pages_of(&TOUCHED));
    assert_eq!(harvest.pages * harvest.page_size, marks.dirty_bytes());

    // Without writes nothing is found; a page written again is found again.
    drop(drain(marks));
    assert_eq!(log.harvest_live().unwrap().pages, 0);
    assert!(marks.is_clean());
    guest.touch(&TOUCHED[3..4]);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED[3..4]));
}

#[rstest]
#[case::coarser(16384)]
#[case::finer(512)]
fn bitmap_of_another_page_size_covers_the_written_pages(#[case] page_size: u64) {
    needs!(Kvm);
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

/// KVM protects one GiB per call, and the last part has an odd number of pages.
#[test]
fn slot_of_several_gib_is_logged_and_protected_to_its_end() {
    needs!(Kvm);
    const GIB: u64 = 1 << 30;
    let size = 2 * GIB + 5 * PAGE;
    let mut guest = Guest::with_ram([(0, size)], |_| ());
    guest.boot(Program::Touch);
    let touched = [0x20000, GIB - 8, GIB, 2 * GIB - 8, 2 * GIB, size - 8];
    guest.touch(&touched);
    let log = guest.log(Reprotect::WhenMarked);
    for _ in 0..2 {
        assert_eq!(log.harvest_live().unwrap().pages, 0);
        guest.touch(&touched);
        let written = touched.iter().map(|address| address / PAGE).collect();
        assert_eq!(pages(&logged(&guest, &log)), written);
    }
}

#[rstest]
fn failed_save_keeps_its_pages_for_the_next_save(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    let marks = Arc::clone(guest.ram.dirty_bitmap());

    guest.touch(&TOUCHED[..3]);
    let epoch = log.begin_live_epoch().unwrap();
    guest.touch(&TOUCHED[2..5]); // while the save is under way
    drop(epoch); // the save fails

    let epoch = log.begin_live_epoch().unwrap();
    let list = pages_of(&[INPUT]); // the host's
    assert_eq!(pages(epoch.bitmap()), &pages_of(&TOUCHED[..5]) | &list);
    epoch.release().unwrap();
    log.harvest_live().unwrap();
    assert!(marks.is_clean());
}

#[rstest]
fn harvest_that_fails_at_the_second_slot_loses_no_page(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
) {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(reprotect);
    guest.touch(&TOUCHED[..2]);

    log_high_slot(&guest, false);
    let marks = Arc::clone(guest.ram.dirty_bitmap());
    drop(drain(&marks));
    let error = log.harvest_live().unwrap_err();
    assert!(matches!(error, HarvestError::Get { slot: 1, .. }));
    assert!(error.source().is_some() && error.to_string().contains("slot 1"));
    assert_eq!(pages(&marks), pages_of(&TOUCHED[..2]));

    // Now the log of the second slot is off, and that of the first is on.
    guest.touch(&TOUCHED[4..]);
    log_high_slot(&guest, true);
    log.harvest_live().unwrap();
    let low = [&TOUCHED[..2], &[INPUT]].concat();
    let high = LOW_SIZE / PAGE..(LOW_SIZE + HIGH_SIZE) / PAGE;
    assert_eq!(pages(&marks), &pages_of(&low) | &high.collect());
    // From here on the log is exact again.
    guest.touch(&TOUCHED[5..6]);
    assert_eq!(pages(&logged(&guest, &log)), pages_of(&TOUCHED[5..6]));

    // A log that was found off does not count as having stayed on.
    log_high_slot(&guest, false);
    log.harvest_live().unwrap_err();
    drop(log);
    drop(DirtyLog::start(&guest.slots).unwrap());
    assert_eq!(marks.dirty_bytes(), LOW_SIZE + HIGH_SIZE);
}

/// Switches the log of the second slot, as a VMM might do behind the back of `DirtyLog`.
fn log_high_slot(guest: &Guest, on: bool) {
    let memory = guest.ram.host_memory(LOW_SIZE, 1).unwrap();
    let region = kvm_userspace_memory_region {
        slot: 1,
        flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: HIGH,
        memory_size: HIGH_SIZE,
        userspace_addr: memory.as_ptr().addr() as u64,
    };
    // SAFETY: the slot as it is registered, except for its flags.
    #[allow(unsafe_code)]
    unsafe { guest.vm.set_user_memory_region(region) }.unwrap();
}

#[test]
fn host_writes_are_marked_with_guest_writes() {
    needs!(Kvm);
    let mut guest = Guest::touching();
    let log = guest.log(Reprotect::WhenRead);
    guest.touch(&TOUCHED[..1]); // writes its list at INPUT from the host
    guest.ram.write(HIGH + 0x1ffe, &[1; 4]).unwrap(); // across a page border
    guest.ram.write_at(offset(0x80000), &[1]).unwrap();
    guest.ram.mark(0x90000, 1).unwrap(); // a device wrote there

    let marks = guest.ram.dirty_bitmap();
    log.harvest_live().unwrap();
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

/// Harvests a guest that writes random pages all the time: the pages copied after each harvest,
/// combined, must equal its RAM. With `apart`, another thread takes the marks and copies, so that
/// it may do so in the middle of a harvest.
#[rstest]
fn harvesting_a_running_guest_loses_no_page(
    #[values(Reprotect::WhenRead, Reprotect::WhenMarked)] reprotect: Reprotect,
    #[values(false, true)] apart: bool,
) {
    needs!(Kvm);
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
        let taken = drain(marks);
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
                pages += log.harvest_live().unwrap().pages;
            }
            harvested.store(true, Ordering::Release);
            copier.join().unwrap();
        } else {
            while more(pages) {
                pages += log.harvest_live().unwrap().pages;
                save();
            }
        }
        ram.write(INPUT, &[1]).unwrap();
        running.join().unwrap();
    });
    pages += log.harvest_live().unwrap().pages;
    save();
    assert!(pages >= enough, "the guest ended by itself");
    let lost: Vec<_> = std::iter::zip(copy.chunks(4096), guest.image().chunks(4096))
        .enumerate()
        .filter_map(|(page, (copied, real))| (copied != real).then_some(page))
        .collect();
    assert!(lost.is_empty(), "pages {lost:?} of {pages} harvested");
}

/// In the middle of a harvest, this thread takes the marks and copies a page, and the guest writes
/// it again before KVM protects it: of thousands of scattered pages the first is marked long before
/// the last.
#[rstest]
#[case::protected_before_they_are_marked(Reprotect::WhenRead, 2)]
#[case::protected_after(Reprotect::WhenMarked, 20)]
fn page_copied_and_rewritten_during_a_harvest_is_found_again(
    #[case] reprotect: Reprotect,
    #[case] trials: u32,
) {
    needs!(Kvm);
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
            let harvest = threads.spawn(|| log.harvest_live().unwrap());
            while !marks.is_dirty(scattered[0]).unwrap() {
                std::hint::spin_loop();
            }
            drop(drain(&marks));
            let copied = word(&guest, scattered[0]);
            guest.touch(&scattered[..1]);
            harvest.join().unwrap();
            copied
        });
        assert_eq!(word(&guest, scattered[0]), copied + 1);
        log.harvest_live().unwrap();
        let found = drain(&marks);
        assert!(found.is_dirty(scattered[0]).unwrap(), "trial {trial}");
    }
}

fn word(guest: &Guest, address: u64) -> u64 {
    let mut bytes = [0; 8];
    guest.ram.read(address, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}
