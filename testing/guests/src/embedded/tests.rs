use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rstest::rstest;

use super::*;

fn is_available(
    tracking: Tracking,
    #[cfg_attr(not(target_os = "linux"), expect(unused))] test: &str,
) -> bool {
    match tracking {
        #[cfg(target_os = "linux")]
        Tracking::Userfaultfd => test_machine::Need::Userfaultfd.met(test),
        Tracking::Mprotect => true,
    }
}

fn tracked(tracking: Tracking, ram: u64) -> (Arc<Memory>, Arc<dyn Tracker>) {
    let mut guest = Embedded::new(Layout::of(ram), tracking).unwrap();
    let tracker = guest.track().unwrap();
    (guest.memory, tracker)
}

fn dirty(tracker: &Arc<dyn Tracker>) -> Vec<Range<u64>> {
    tracker.dirty().runs().collect()
}

#[rstest]
#[cfg_attr(target_os = "linux", case::by_userfaultfd(Tracking::Userfaultfd))]
#[case::by_mprotect(Tracking::Mprotect)]
fn only_pages_written_since_the_harvest_are_marked(#[case] tracking: Tracking) {
    if !is_available(tracking, "only_pages_written_since_the_harvest_are_marked") {
        return;
    }
    let page = page_size().unwrap();
    let (memory, tracker) = tracked(tracking, 8 << 20);
    memory.store(3 * page - 8, 1);
    memory.store(3 * page, 2);
    memory.store(9 * page, 3);
    assert_eq!(memory.load(5 * page), 0);
    assert_eq!(dirty(&tracker), [2 * page..4 * page, 9 * page..10 * page]);

    tracker.begin().unwrap().release().unwrap();
    memory.store(9 * page + 8, 4);
    assert_eq!(dirty(&tracker), [9 * page..10 * page]);
    assert_eq!(memory.load(9 * page), 3);
}

#[rstest]
#[cfg_attr(target_os = "linux", case::by_userfaultfd(Tracking::Userfaultfd))]
#[case::by_mprotect(Tracking::Mprotect)]
fn two_guests_of_one_process_are_tracked_separately(#[case] tracking: Tracking) {
    if !is_available(tracking, "two_guests_of_one_process_are_tracked_separately") {
        return;
    }
    let page = page_size().unwrap();
    let (one, tracker_of_one) = tracked(tracking, 8 << 20);
    let (other, tracker) = tracked(tracking, 8 << 20);
    other.store(page, 1);
    one.store(0, 1);
    drop((one, tracker_of_one));
    other.store(4 * page, 1);
    assert_eq!(dirty(&tracker), [page..2 * page, 4 * page..5 * page]);
}

/// Linux limits the number of mappings (`vm.max_map_count`, 65,530 by default). If every second
/// page is writable, each page is a mapping.
#[cfg(target_os = "linux")]
#[test]
fn more_scattered_pages_than_mappings_are_all_marked() {
    const CHILD: &str = "GUESTS_TEST_MAPPINGS";
    // Runs in its own process, since other tests need mappings too.
    if std::env::var_os(CHILD).is_none() {
        let name = "embedded::tests::more_scattered_pages_than_mappings_are_all_marked";
        let test = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&test.stdout).into_owned();
        assert!(
            test.status.success() && output.contains("1 passed"),
            "{output}"
        );
        return;
    }
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let (limit, page) = (limit.trim().parse::<u64>().unwrap(), page_size().unwrap());
    let (memory, tracker) = tracked(Tracking::Mprotect, (limit + 4096) * page);
    for number in (0..limit + 2048).step_by(2) {
        nix::errno::Errno::set_raw(77);
        memory.store(number * page, number);
        let errno = nix::errno::Errno::last_raw();
        assert_eq!(errno, 77, "page {number}: the handler leaves errno alone");
        assert!(
            tracker.dirty().is_dirty(number * page).unwrap(),
            "page {number}"
        );
    }
}

#[rstest]
#[cfg_attr(target_os = "linux", case::by_userfaultfd(Tracking::Userfaultfd))]
#[case::by_mprotect(Tracking::Mprotect)]
fn copying_marked_pages_during_writes_misses_no_write(#[case] tracking: Tracking) {
    if !is_available(
        tracking,
        "copying_marked_pages_during_writes_misses_no_write",
    ) {
        return;
    }
    const PAGES: u64 = 1000;
    let page = page_size().unwrap();
    let (memory, tracker) = tracked(tracking, 16 << 20);
    let mut epoch = tracker.begin().unwrap();
    let copy: Vec<_> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy_marked = || {
        for run in tracker.extend(&mut epoch).unwrap().runs() {
            for number in run.start / page..run.end / page {
                copy[number as usize].store(memory.load(number * page), Ordering::Relaxed);
            }
        }
    };
    // Each page is written once a round, so a missed write stays missed.
    for round in 1..=test_machine::rounds(6, 60) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (0..PAGES).for_each(|number| memory.store(number * page, round));
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                copy_marked();
            }
        });
        copy_marked();
        let missed = copy
            .iter()
            .position(|word| word.load(Ordering::Relaxed) != round);
        assert_eq!(missed, None, "round {round}");
    }
}
