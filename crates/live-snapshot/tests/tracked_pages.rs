//! Tracked pages that are larger than the pages of the host or of the image, and marks and discards
//! while faults are handled.

#![cfg(all(target_os = "linux", not(ramsnap_loom)))]

#[path = "support/guest.rs"]
mod guest;
#[path = "support/memory.rs"]
mod memory;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use dirty_bitmap::Policy;
use guest::{Images, PAGE, assert_same};
use guest_ram::GuestRam;
use live_snapshot::{LiveError, LiveSnapshot, Method, UffdTracker};
use memory::{Discard, Kind, Memory};
use memory_writer::{Durability, Layout, MemoryWriter};
use page_reader::{PageReader, RamLayout};
use random::Random;
use rstest::rstest;
use test_machine::needs;

const SIZE: u64 = 1 << 20;

/// Private memory whose second region begins inside of a tracked page.
fn memory_with_a_gap() -> Memory {
    let first = 36 << 10;
    let layout = RamLayout::new([(0, first), (4 << 30, SIZE - first)]).unwrap();
    let ram = Arc::new(GuestRam::new(layout).unwrap());
    ram.write_at(0, &vec![0x5a; SIZE as usize]).unwrap();
    Memory { ram, file: None }
}

fn contents(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    memory.ram.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Takes a snapshot, and writes `after` once its point in time is set. Returns whether it was
/// refused because of a discarded page.
fn save(
    memory: &Memory,
    tracker: &Arc<UffdTracker>,
    images: &mut Images,
    diff: bool,
    after: &[u64],
) -> bool {
    let newest = images.newest();
    let live = LiveSnapshot::options().diff(diff);
    let live = live.begin(tracker, images.next(diff)).unwrap();
    let ram = contents(memory);
    let frozen = live.freeze().unwrap();
    for page in after {
        memory.ram.write_at(page * PAGE, &[9; 8]).unwrap();
    }
    match frozen.commit() {
        Ok(_) => assert_same(&images.contents(), &ram),
        Err(LiveError::Discarded { .. }) => {
            images.forget(newest);
            return true;
        }
        Err(error) => panic!("{error}"),
    }
    false
}

/// The page before the discarded one is written often, so the part of the RAM that is not protected
/// begins inside of a tracked page.
#[test]
fn discard_after_a_written_page_is_found() {
    needs!(Userfaultfd);
    let memory = memory_with_a_gap();
    let options = UffdTracker::options().page_size(2 * PAGE);
    let tracker = Arc::new(options.start(&memory.ram).unwrap());
    let mut images = Images::with_pages(Layout::Sealed, SIZE, 2 * PAGE);
    assert!(!save(&memory, &tracker, &mut images, false, &[]));
    memory.discard(Discard::DontNeed, 10);
    memory.ram.write_at(10 * PAGE, b"new data").unwrap();
    for _ in 0..3 {
        memory.ram.write_at(9 * PAGE, &[1; 8]).unwrap();
        assert!(!save(&memory, &tracker, &mut images, true, &[9]));
    }
}

#[test]
fn discard_of_the_last_half_of_a_page_is_marked() {
    needs!(Userfaultfd);
    let memory = memory_with_a_gap();
    let options = UffdTracker::options().page_size(2 * PAGE);
    let tracker = Arc::new(options.start(&memory.ram).unwrap());
    let mut images = Images::with_pages(Layout::Sealed, SIZE, 2 * PAGE);
    assert!(!save(&memory, &tracker, &mut images, false, &[]));
    memory.discard(Discard::DontNeed, SIZE / PAGE - 1);
    assert!(!save(&memory, &tracker, &mut images, true, &[]));
}

/// Discards and writes of pages of the host, of which a tracked page has several.
#[rstest]
fn unseen_discards_of_parts_of_pages_are_never_lost(
    #[values(2, 16)] pages: u64,
    #[values(Policy::Pages, Policy::Blocks)] policy: Policy,
) {
    needs!(Userfaultfd);
    for seed in 0..12 {
        let mut random = Random::seeded(seed);
        let memory = memory_with_a_gap();
        let options = UffdTracker::options().page_size(pages * PAGE);
        let tracker = Arc::new(options.policy(policy).start(&memory.ram).unwrap());
        let mut images = Images::with_pages(Layout::Packed, SIZE, pages * PAGE);
        assert!(!save(&memory, &tracker, &mut images, false, &[]));
        for _ in 0..6 {
            for _ in 0..random.below(12) {
                let page = random.below(SIZE / PAGE);
                match random.below(3) {
                    0 => memory.discard(Discard::DontNeed, page),
                    _ => memory.ram.write_at(page * PAGE, &[7; 8]).unwrap(),
                }
            }
            let after: Vec<_> = (0..4).map(|_| random.below(SIZE / PAGE)).collect();
            save(&memory, &tracker, &mut images, true, &after);
        }
    }
}

/// Pages of the image are read in the order of the file, which is not that of the RAM.
#[test]
fn halves_of_a_page_are_read_in_any_order() {
    needs!(Userfaultfd);
    let memory = Memory::new(Kind::Private, SIZE);
    memory.ram.write_at(9 * PAGE, &[7; 4096]).unwrap();
    let options = UffdTracker::options().page_size(2 * PAGE);
    let tracker = Arc::new(options.start(&memory.ram).unwrap());
    for overwrite in [false, true] {
        memory.ram.write_at(8 * PAGE, &[0; 4096]).unwrap();
        let mut images = Images::new(Layout::Packed, SIZE);
        let options = MemoryWriter::options().durability(Durability::None);
        let writer = images.next_by(false, options.skip_zeros(true));
        let live = LiveSnapshot::options().method(Method::PreCopy);
        let live = live.begin(&tracker, writer).unwrap();
        // The second half has a place in the file already, the first one has none.
        memory.ram.write_at(8 * PAGE, &[8; 8192]).unwrap();
        let ram = contents(&memory);
        let frozen = live.freeze().unwrap();
        if overwrite {
            memory.ram.write_at(8 * PAGE, &[9; 8192]).unwrap();
        }
        frozen.commit().unwrap();
        assert_same(&images.contents(), &ram);
    }
}

/// Between its unprotection and its mark, a page looks discarded.
#[rstest]
fn marks_and_discards_while_the_guest_writes_end_no_snapshot(#[values(true, false)] mark: bool) {
    needs!(Userfaultfd);
    let memory = Memory::new(Kind::Private, SIZE);
    memory.ram.write_at(0, &vec![0x5a; SIZE as usize]).unwrap();
    let options = UffdTracker::options().policy(Policy::Blocks);
    let tracker = Arc::new(options.start(&memory.ram).unwrap());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let repeat = |seed, step: &(dyn Fn(u64) + Sync)| {
            let mut random = Random::seeded(seed);
            while !stop.load(Ordering::SeqCst) {
                step(random.below(SIZE / PAGE));
            }
        };
        let write = |page: u64| memory.ram.write_at(page * PAGE, &[1; 8]).unwrap();
        let balloon = |page: u64| match mark {
            true => tracker.mark_range(page * PAGE, 512).unwrap(),
            false => {
                let discard = || memory.discard(Discard::DontNeed, page);
                tracker.discard(page * PAGE, PAGE, discard).unwrap();
            }
        };
        scope.spawn(move || repeat(1, &write));
        scope.spawn(move || repeat(2, &balloon));
        for _ in 0..40 {
            let mut images = Images::new(Layout::Packed, SIZE);
            let live = LiveSnapshot::options().begin(&tracker, images.next(false));
            let saved = live.and_then(LiveSnapshot::freeze);
            let saved = saved.and_then(live_snapshot::Frozen::commit);
            if saved.is_err() {
                stop.store(true, Ordering::SeqCst);
            }
            saved.unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
}
