//! The exits that the tracker handles as writes to its RAM, and its errors.
#![cfg(unix)]

use std::sync::Arc;

use dirty_bitmap::{Policy, TrackedBitmap};
use hvf_backend::{
    Exception, Exit, ExitAction, Stage2FaultError, Stage2Tracker, Stage2TrackerError,
};
use page_reader::{OutsideRam, RamLayout};
use rstest::rstest;
use write_faults::{Memory, Mprotect, page_size};

const MIB: u64 = 1 << 20;
/// The RAM has two regions with device registers between them.
const LOW: u64 = 0x4000_0000;
const HIGH: u64 = 0x8000_0000;

fn layout() -> RamLayout {
    RamLayout::new([(LOW, 2 * MIB), (HIGH, MIB)]).unwrap()
}

fn tracker(
    layout: RamLayout,
    page_size: u64,
) -> Result<Stage2Tracker<Mprotect>, Stage2TrackerError> {
    let memory = Arc::new(Memory::new(layout.ram_size()).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(0, layout.ram_size(), page_size).unwrap());
    Stage2Tracker::new(layout, &bitmap, Policy::Pages, Mprotect::new(&memory))
}

/// Returns a tracker whose RAM is protected and clean.
fn armed() -> Stage2Tracker<Mprotect> {
    let tracker = tracker(layout(), page_size().unwrap()).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
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
#[case::store(STORE)]
#[case::store_to_a_page_never_touched(0x9200_0047)]
#[case::store_with_valid_register(0x93c3_804f)]
#[case::cache_maintenance(0x9200_014f)]
#[case::walk_for_a_load(0x9200_008f)]
#[case::walk_for_a_store(0x9200_00cf)]
#[case::walk_for_a_fetch(0x8200_008f)]
fn a_write_to_ram_is_handled_and_marked_by_offset(#[case] syndrome: u64) {
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
        assert_eq!(answer, ExitAction::Resume);
        let dirty: Vec<_> = tracker.bitmap().runs().collect();
        assert_eq!(dirty, [offset..offset + page], "{address:#x}");
        tracker.checkpoint().unwrap().release().unwrap();
    }
}

#[rstest]
#[case::load(exception(LOAD, LOW))]
#[case::fetch(exception(0x8200_000f, LOW))]
#[case::store_below_the_ram(exception(STORE, LOW - 8))]
#[case::store_to_a_device_between_the_regions(exception(STORE, LOW + 2 * MIB))]
#[case::store_past_the_ram(exception(STORE, HIGH + MIB))]
#[case::walk_of_tables_outside_ram(exception(0x9200_00cf, 0x1000))]
#[case::external_abort(exception(0x9200_0050, LOW))]
#[case::hypercall(exception(0x5a00_0000, LOW))]
#[case::system_register(exception(0x6232_0140, LOW))]
#[case::timer(Exit::VtimerActivated)]
#[case::request(Exit::Canceled)]
#[case::unknown_reason(Exit::Unknown(77))]
fn other_exits_are_left_to_the_vmm(#[case] exit: Exit) {
    let tracker = armed();
    assert_eq!(
        tracker.handle_exit(&tracker.enter(), &exit).unwrap(),
        ExitAction::Forward
    );
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn on_write_fault_outside_the_ram_is_an_error() {
    let tracker = armed();
    let error = tracker.on_write_fault(LOW + 2 * MIB).unwrap_err();
    let address = LOW + 2 * MIB;
    assert!(
        matches!(error, Stage2FaultError::OutsideRam { guest_address } if guest_address == address)
    );
    assert_eq!(
        error.to_string(),
        "write fault at guest-physical address 0x40200000, which is not tracked RAM: \
         emulate the device at this address, or stop the vCPU"
    );
    assert!(tracker.bitmap().is_clean());
}

#[test]
fn a_host_write_is_marked_in_every_region_or_not_at_all() {
    let touching = RamLayout::new([(LOW, 2 * MIB), (LOW + 2 * MIB, MIB)]).unwrap();
    let page = page_size().unwrap();
    let tracker = tracker(touching, page).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    tracker.mark_host_write(LOW + 2 * MIB - 1, 2).unwrap();
    let dirty: Vec<_> = tracker.bitmap().runs().collect();
    assert_eq!(dirty, [2 * MIB - page..2 * MIB + page]);

    let tracker = armed();
    let error = tracker.mark_host_write(LOW + 2 * MIB - 1, 2).unwrap_err();
    assert!(matches!(error, OutsideRam::Guest { outside, .. } if outside == LOW + 2 * MIB));
    assert!(tracker.bitmap().is_clean());
}

#[rstest]
#[case::begins((LOW + 0x1000, MIB), 0x4000, "at 0x40001000")]
#[case::ends((LOW, MIB + 0x1000), 0x4000, "a multiple of the page size of 16384 bytes")]
fn a_region_of_partial_pages_is_an_error(
    #[case] region: (u64, u64),
    #[case] page_size: u64,
    #[case] message: &str,
) {
    let layout = RamLayout::new([region, (HIGH, 0x3000)]).unwrap();
    let error = tracker(layout, page_size).unwrap_err();
    assert!(matches!(error, Stage2TrackerError::MisalignedRegion { .. }));
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn a_bitmap_of_other_ram_is_an_error() {
    let memory = Arc::new(Memory::new(MIB).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(LOW, 3 * MIB, 0x4000).unwrap());
    let refused = Stage2Tracker::new(layout(), &bitmap, Policy::Pages, Mprotect::new(&memory));
    let error = refused.err().unwrap();
    assert!(matches!(error, Stage2TrackerError::BitmapMismatch(_)));
    assert!(
        error.to_string().contains("create it with start 0"),
        "{error}"
    );
    assert!(bitmap.is_clean());
}

#[test]
fn stop_unprotects_and_marks_all_ram() {
    let memory = Arc::new(Memory::new(3 * MIB).unwrap());
    let bitmap = Arc::new(TrackedBitmap::tracked(0, 3 * MIB, page_size().unwrap()).unwrap());
    let tracker =
        Stage2Tracker::new(layout(), &bitmap, Policy::Pages, Mprotect::new(&memory)).unwrap();
    tracker.checkpoint().unwrap().release().unwrap();
    assert!(bitmap.is_clean());
    tracker.stop().unwrap();
    // Later writes are not tracked.
    assert_eq!(bitmap.dirty_bytes(), 3 * MIB);
    // A write to a protected page would end the process, because no handler is installed.
    (0..3 * MIB)
        .step_by(4096)
        .for_each(|at| memory.store(at, 1));
}
