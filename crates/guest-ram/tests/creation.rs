//! Creating guest RAM: what is refused, who maps the memory, and who unmaps it.

#![allow(unsafe_code)]

use std::error::Error;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use dirty_bitmap::DirtyBitmap;
use guest_ram::{BitmapMismatch, GuestRam, GuestRamError, Mapping, host_page_size};
use page_reader::{PageReader, RamLayout};
use rstest::rstest;

const LOW_SIZE: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;

fn layout() -> RamLayout {
    RamLayout::new([(0, LOW_SIZE), (HIGH, 1 << 20)]).unwrap()
}

#[rstest]
#[case::too_large(1 << 30, 0, 1 << 21)]
#[case::too_small(1 << 30, 0, 1 << 19)]
#[case::elsewhere(1 << 30, 0x4000, 1 << 20)]
fn a_bitmap_of_other_memory_is_refused(
    #[case] guest_start: u64,
    #[case] bitmap_start: u64,
    #[case] bitmap_size: u64,
) {
    let layout = RamLayout::single(guest_start, 1 << 20).unwrap();
    let dirty = DirtyBitmap::new(bitmap_start, bitmap_size, 4096).unwrap();
    let options = GuestRam::options().dirty_bitmap(Arc::new(dirty));
    let expected = BitmapMismatch {
        bitmap_start,
        bitmap_size,
        ram_size: 1 << 20,
    };
    for refused in [
        options.allocate(layout.clone()).unwrap_err(),
        options.check(&layout).unwrap_err(),
    ] {
        assert!(
            matches!(refused, GuestRamError::BitmapMismatch(found) if found == expected),
            "{refused}"
        );
    }
}

#[test]
fn a_bitmap_at_the_start_of_one_of_two_regions_is_refused() {
    let layout = RamLayout::new([(1 << 30, 1 << 20), (HIGH, 1 << 20)]).unwrap();
    let dirty = DirtyBitmap::new(1 << 30, 2 << 20, 4096).unwrap();
    let options = GuestRam::options().dirty_bitmap(Arc::new(dirty));
    let refused = options.allocate(layout).unwrap_err();
    assert!(matches!(refused, GuestRamError::BitmapMismatch(_)));
}

#[test]
fn ram_larger_than_the_address_space_is_an_allocation_error() {
    let layout = RamLayout::single(0, 1 << 50).unwrap();
    let dirty = Arc::new(DirtyBitmap::new(0, 1 << 50, 1 << 40).unwrap());
    let options = GuestRam::options().dirty_bitmap(dirty);
    let error = options.allocate(layout).unwrap_err();
    assert!(matches!(
        error,
        GuestRamError::Allocate { call: "mmap", .. }
    ));
    assert!(error.source().is_some() && error.to_string().contains("ulimit -v"));
}

/// 8,192 guests of 64 GiB each, one after another, have four times the addresses that a process
/// can have.
#[test]
fn allocated_ram_is_unmapped_with_its_guest() {
    let size = 64 << 30;
    let layout = RamLayout::single(0, size).unwrap();
    let dirty = Arc::new(DirtyBitmap::new(0, size, 1 << 30).unwrap());
    let options = GuestRam::options().dirty_bitmap(dirty);
    for _ in 0..8192 {
        drop(options.allocate(layout.clone()).unwrap());
    }
}

/// Counts the owners that were dropped.
#[derive(Debug)]
struct Owner(Arc<AtomicUsize>, #[allow(dead_code)] Mapping);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Returns a mapping of `len` bytes, and counts the drop of what it belongs to.
fn owned(len: usize, dropped: &Arc<AtomicUsize>) -> Mapping {
    let memory = Mapping::anonymous(len).unwrap();
    let start = memory.start();
    // SAFETY: the owner keeps the memory mapped. No reference to it exists.
    unsafe { Mapping::new(start, len, Owner(Arc::clone(dropped), memory)) }
}

#[test]
fn the_owners_of_mappings_are_dropped_with_the_ram() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let map = |region: &page_reader::RamRange| {
        Ok::<_, GuestRamError>(owned(region.size as usize, &dropped))
    };
    let ram: GuestRam = GuestRam::options().map(layout(), map).unwrap();
    ram.write(HIGH, b"high").unwrap();
    assert_eq!(dropped.load(SeqCst), 0);
    drop(ram);
    assert_eq!(dropped.load(SeqCst), 2);
}

#[test]
fn a_failure_of_the_second_region_drops_the_first() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let map = |region: &page_reader::RamRange| match region.region {
        0 => Ok(owned(region.size as usize, &dropped)),
        _ => Err(GuestRamError::Allocate {
            call: "mmap",
            size: region.size,
            source: std::io::ErrorKind::OutOfMemory.into(),
        }),
    };
    let options = GuestRam::<dirty_bitmap::Untracked>::options();
    let error = options.map(layout(), map).unwrap_err();
    assert!(matches!(error, GuestRamError::Allocate { .. }), "{error}");
    assert_eq!(dropped.load(SeqCst), 1);

    let small = |region: &page_reader::RamRange| {
        Ok::<_, GuestRamError>(owned(region.size as usize / (1 + region.region), &dropped))
    };
    let error = options.map(layout(), small).unwrap_err();
    assert!(
        matches!(
            error,
            GuestRamError::MappingSize {
                guest_start: HIGH,
                mapped: 0x8_0000,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(dropped.load(SeqCst), 3);
}

#[test]
fn memory_of_the_caller_is_adopted_if_it_fits() {
    let owner: GuestRam = GuestRam::new(layout()).unwrap();
    let addresses = [owner.host_address(0), owner.host_address(1)];
    // SAFETY: both regions' mappings, which `owner` keeps until the end of the test, and which are
    // accessed by atomic operations only. The addresses of the other cases are refused.
    let adopt = |addresses: &[NonNull<u8>]| unsafe {
        GuestRam::<dirty_bitmap::Untracked>::options().adopt(layout(), addresses)
    };

    let adopted = adopt(&addresses).unwrap();
    adopted.write(HIGH, b"seen by both").unwrap();
    let mut bytes = [0; 12];
    owner.read(HIGH, &mut bytes).unwrap();
    assert_eq!(&bytes, b"seen by both");
    assert!(adopted.dirty_bitmap().is_dirty(LOW_SIZE).unwrap());
    assert!(owner.dirty_bitmap().is_clean());
    drop(adopted);
    owner.read_at(LOW_SIZE, &mut bytes).unwrap(); // still mapped

    for (given, addresses) in [(1, &addresses[..1]), (0, &[]), (3, &[addresses[0]; 3])] {
        let error = adopt(addresses).unwrap_err();
        assert!(
            matches!(error, GuestRamError::AddressCount { given: of, regions: 2 } if of == given),
            "{error}"
        );
    }
    let odd = addresses[1].map_addr(|address| address.checked_add(8).unwrap());
    let error = adopt(&[addresses[0], odd]).unwrap_err();
    let page_size = host_page_size();
    assert!(
        matches!(error, GuestRamError::MisalignedAddress { address, page_size: of }
            if address == odd.addr().get() && of == page_size),
        "{error}"
    );
}

#[rstest]
#[case::past_the_end(8192, 1)]
#[case::across_the_end(8191, 2)]
#[case::of_no_number(usize::MAX, 2)]
fn a_mapping_is_not_accessed_outside(#[case] offset: usize, #[case] len: usize) {
    let mapping = Mapping::anonymous(8192).unwrap();
    let bytes = vec![1; len];
    let panics =
        |access: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(access)).is_err();
    assert!(panics(&|| mapping.store(offset, &bytes)));
    assert!(panics(&|| _ = mapping.host_memory(offset, len)));
    let mut all = [1; 8192];
    mapping.host_memory(0, 8192).copy_to(&mut all);
    assert_eq!(all, [0; 8192]);
}

#[test]
fn a_mapping_of_no_bytes_is_refused() {
    let error = Mapping::anonymous(0).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}
