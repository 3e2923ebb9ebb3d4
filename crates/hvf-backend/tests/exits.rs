//! Which exits the tracker takes for writes to its RAM, and what it says of those that can't be.
#![cfg(unix)]

use std::sync::Arc;

use dirty_bitmap::{Policy, TrackedBitmap};
use hvf_backend::{Answer, Exception, Exit, FaultError, Stage2Tracker, TrackError};
use page_reader::{OutsideRam, RamLayout};
use rstest::rstest;
use test_machine::tracked::{Memory, Mprotect, page_size};

const MIB: u64 = 1 << 20;
/// Two regions, and device registers between them.
const LOW: u64 = 0x4000_0000;
const HIGH: u64 = 0x8000_0000;

fn layout() -> RamLayout {
    RamLayout::new([(LOW, 2 * MIB), (HIGH, MIB)]).unwrap()
}

fn tracker(layout: RamLayout, page_size: u64) -> Result<Stage2Tracker<Mprotect>, TrackError> {
    let memory = Arc::new(Memory::new(layout.ram_size()).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(0, layout.ram_size(), page_size).unwrap());
    Stage2Tracker::new(layout, &bitmap, Policy::Pages, Mprotect::new(&memory))
}

/// All of its RAM protected, and clean.
fn armed() -> Stage2Tracker<Mprotect> {
    let tracker = tracker(layout(), page_size().unwrap()).unwrap();
    tracker.arm().unwrap().release().unwrap();
    tracker
}

fn exception(syndrome: u64, physical_address: u64) -> Exit {
    Exit::Exception(Exception {
        syndrome,
        physical_address,
        ..Exception::default()
    })
}

const STORE: u64 = 0x9200_004f;
const LOAD: u64 = 0x9200_000f;

#[rstest]
#[case::a_store(STORE)]
#[case::a_store_to_a_page_never_touched(0x9200_0047)]
#[case::a_store_whose_register_is_known(0x93c3_804f)]
#[case::cache_maintenance(0x9200_014f)]
#[case::a_walk_for_a_load(0x9200_008f)]
#[case::a_walk_for_a_store(0x9200_00cf)]
#[case::a_walk_for_a_fetch(0x8200_008f)]
fn a_write_to_ram_is_marked_by_its_offset_and_tried_again(#[case] syndrome: u64) {
    let tracker = armed();
    let page = page_size().unwrap();
    for (address, offset) in [
        (LOW, 0),
        (LOW + 2 * MIB - 1, 2 * MIB - page),
        (HIGH + 8, 2 * MIB),
    ] {
        let answer = tracker
            .handle_exit(&tracker.enter(), &exception(syndrome, address))
            .unwrap();
        assert_eq!(answer, Answer::Handled);
        let dirty: Vec<_> = tracker.bitmap().runs().collect();
        assert_eq!(dirty, [offset..offset + page], "{address:#x}");
        tracker.arm().unwrap().release().unwrap();
    }
}

#[rstest]
#[case::a_load(exception(LOAD, LOW))]
#[case::a_fetch(exception(0x8200_000f, LOW))]
#[case::a_store_below_the_ram(exception(STORE, LOW - 8))]
#[case::a_store_to_a_device_between_the_regions(exception(STORE, LOW + 2 * MIB))]
#[case::a_store_past_the_ram(exception(STORE, HIGH + MIB))]
#[case::a_walk_of_tables_that_are_no_ram(exception(0x9200_00cf, 0x1000))]
#[case::an_external_abort(exception(0x9200_0050, LOW))]
#[case::a_hypercall(exception(0x5a00_0000, LOW))]
#[case::a_system_register(exception(0x6232_0140, LOW))]
#[case::a_timer(Exit::VtimerActivated)]
#[case::a_request(Exit::Canceled)]
#[case::a_reason_of_a_later_macos(Exit::Unknown(77))]
fn what_is_no_write_to_ram_is_the_monitors(#[case] exit: Exit) {
    let tracker = armed();
    assert_eq!(
        tracker.handle_exit(&tracker.enter(), &exit).unwrap(),
        Answer::NotOurs
    );
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn a_fault_outside_the_ram_asked_for_by_address_is_an_error() {
    let tracker = armed();
    let error = tracker.on_write_fault(LOW + 2 * MIB).unwrap_err();
    let address = LOW + 2 * MIB;
    assert!(matches!(error, FaultError::OutsideRam { guest_address } if guest_address == address));
    assert_eq!(
        error.to_string(),
        "a write fault at guest-physical 0x40200000, where no RAM is tracked: emulate the device that is there, or stop the vCPU"
    );
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn a_host_write_is_marked_in_every_region_or_not_at_all() {
    let touching = RamLayout::new([(LOW, 2 * MIB), (LOW + 2 * MIB, MIB)]).unwrap();
    let page = page_size().unwrap();
    let tracker = tracker(touching, page).unwrap();
    tracker.arm().unwrap().release().unwrap();
    tracker.mark_host_write(LOW + 2 * MIB - 1, 2).unwrap();
    let dirty: Vec<_> = tracker.bitmap().runs().collect();
    assert_eq!(dirty, [2 * MIB - page..2 * MIB + page]);

    let tracker = armed();
    let error = tracker.mark_host_write(LOW + 2 * MIB - 1, 2).unwrap_err();
    assert!(matches!(error, OutsideRam::Guest { outside, .. } if outside == LOW + 2 * MIB));
    assert!(tracker.bitmap().is_clean());
}

#[rstest]
#[case::begins((LOW + 0x1000, MIB), 0x4000, "the RAM region at 0x40001000")]
#[case::ends((LOW, MIB + 0x1000), 0x4000, "does not begin and end with a page of 16384 bytes")]
fn a_region_that_does_not_end_with_a_page_is_refused(
    #[case] region: (u64, u64),
    #[case] page_size: u64,
    #[case] says: &str,
) {
    let layout = RamLayout::new([region, (HIGH, 0x3000)]).unwrap();
    let error = tracker(layout, page_size).unwrap_err();
    assert!(matches!(error, TrackError::MisalignedRegion { .. }));
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn a_bitmap_of_other_ram_is_refused() {
    let memory = Arc::new(Memory::new(MIB).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(LOW, 3 * MIB, 0x4000).unwrap());
    let refused = Stage2Tracker::new(layout(), &bitmap, Policy::Pages, Mprotect::new(&memory));
    let error = refused.err().unwrap();
    assert!(
        error
            .to_string()
            .contains("TrackedBitmap::tracked(0, layout.ram_size(), page_size)"),
        "{error}"
    );
    assert!(bitmap.is_clean());
}

#[test]
fn a_tracker_that_ends_leaves_all_of_the_ram_writable() {
    let memory = Arc::new(Memory::new(3 * MIB).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(0, 3 * MIB, page_size().unwrap()).unwrap());
    let tracker =
        Stage2Tracker::new(layout(), &bitmap, Policy::Pages, Mprotect::new(&memory)).unwrap();
    tracker.arm().unwrap().release().unwrap();
    tracker.stop().unwrap();
    // Protected, this would end the process: nobody answers.
    (0..3 * MIB)
        .step_by(4096)
        .for_each(|at| memory.store(at, 1));
}
