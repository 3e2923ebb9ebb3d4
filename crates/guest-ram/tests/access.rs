//! Host accesses to guest RAM: by guest-physical address, by offset, and as a page source.

use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, TrackedBitmap};
use guest_ram::{GuestRam, TrackedRam};
use page_reader::{OutsideRam, PageReader, RamLayout};
use rstest::rstest;

const LOW_SIZE: u64 = 4 << 20;
const HIGH: u64 = 4 << 30;
const HIGH_SIZE: u64 = 4 << 20;

fn layout() -> RamLayout {
    RamLayout::new([(0, LOW_SIZE), (HIGH, HIGH_SIZE)]).unwrap()
}

/// Returns RAM whose bitmap has pages of this size, and which allocates in pages of the host.
fn ram(page_size: u64) -> GuestRam {
    let dirty = DirtyBitmap::new(0, LOW_SIZE + HIGH_SIZE, page_size).unwrap();
    let options = GuestRam::options().dirty_bitmap(Arc::new(dirty));
    options.allocate(layout()).unwrap()
}

fn runs(ram: &GuestRam) -> Vec<std::ops::Range<u64>> {
    ram.dirty_bitmap().runs().collect()
}

#[test]
fn reader_states_the_layout_of_the_ram() {
    assert_eq!(ram(4096).ram_layout(), Some(&layout()));
}

#[test]
fn new_ram_is_zero_clean_and_of_whole_pages() {
    let ram: GuestRam = GuestRam::new(layout()).unwrap();
    let page_size = guest_ram::host_page_size();
    assert_eq!(ram.dirty_bitmap().page_size(), page_size);
    assert!(ram.dirty_bitmap().is_clean());
    for (number, region) in ram.layout().regions().iter().enumerate() {
        let memory = ram.host_memory(region.offset, usize::MAX).unwrap();
        assert_eq!(memory.len() as u64, region.size);
        let start = memory.as_ptr().addr();
        assert!((start as u64).is_multiple_of(page_size));
        assert_eq!(start, ram.host_address(number).addr().get());
    }
    let mut all = vec![1; (LOW_SIZE + HIGH_SIZE) as usize];
    ram.read_at(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[rstest]
fn writes_at_any_alignment_are_read_back_by_every_method(#[values(4096, 16384)] page_size: u64) {
    let ram = ram(page_size);
    let bytes: Vec<u8> = (1..=64).collect();
    for start in 0..16 {
        for len in 0..=40 {
            let (address, offset) = (HIGH + 0x100 + start, LOW_SIZE + 0x100 + start);
            ram.write(address - 8, &[0; 80]).unwrap();
            ram.write(address, &bytes[..len]).unwrap();
            let mut copy = vec![0; len];
            ram.read(address, &mut copy).unwrap();
            assert_eq!(copy, bytes[..len]);
            let mut around = vec![0; len + 2];
            ram.read_at(offset - 1, &mut around).unwrap();
            assert_eq!(around[1..=len], bytes[..len]);
            assert_eq!((around[0], around[len + 1]), (0, 0));
        }
    }
    assert_eq!(runs(&ram), [LOW_SIZE..LOW_SIZE + page_size]);
}

#[rstest]
fn a_write_across_regions_is_contiguous_in_the_memory_file(#[values(4096, 16384)] page_size: u64) {
    let ram = ram(page_size);
    ram.write_at(LOW_SIZE - 4, b"lasthigh").unwrap();
    let mut ends = [0; 4];
    ram.read(HIGH, &mut ends).unwrap();
    assert_eq!(&ends, b"high");
    ram.read(LOW_SIZE - 4, &mut ends).unwrap();
    assert_eq!(&ends, b"last");
    assert_eq!(runs(&ram), [LOW_SIZE - page_size..LOW_SIZE + page_size]);

    // Host memory ends with its region.
    let memory = ram.host_memory(LOW_SIZE - 4, 8).unwrap();
    assert_eq!(memory.len(), 4);
    memory.copy_to(&mut ends);
    assert_eq!(&ends, b"last");
}

#[rstest]
fn the_pages_of_a_write_are_marked_and_no_others(#[values(4096, 16384)] page_size: u64) {
    let ram = ram(page_size);
    ram.write(HIGH + 3 * page_size - 1, &[1; 2]).unwrap();
    let third = LOW_SIZE + 2 * page_size;
    assert_eq!(runs(&ram), [third..third + 2 * page_size]);

    drop(ram.dirty_bitmap().drain().unwrap());
    ram.mark(HIGH + 8 * page_size, page_size + 1).unwrap();
    let ninth = LOW_SIZE + 8 * page_size;
    assert_eq!(runs(&ram), [ninth..ninth + 2 * page_size]);

    drop(ram.dirty_bitmap().drain().unwrap());
    ram.write(0, &[]).unwrap();
    ram.mark(HIGH, 0).unwrap();
    assert!(ram.dirty_bitmap().is_clean());
    ram.mark_all();
    assert_eq!(runs(&ram), [0..LOW_SIZE + HIGH_SIZE]);
}

#[rstest]
fn access_outside_the_ram_fails_and_changes_nothing(#[values(4096, 16384)] page_size: u64) {
    let ram = ram(page_size);
    for address in [
        LOW_SIZE - 1,
        LOW_SIZE,
        HIGH - 1,
        HIGH + HIGH_SIZE - 1,
        u64::MAX,
    ] {
        let error = ram.write(address, &[1; 2]).unwrap_err();
        assert!(matches!(error, OutsideRam::Guest { .. }), "{error}");
        let mut buf = [7; 2];
        assert_eq!(ram.read(address, &mut buf).unwrap_err(), error);
        assert_eq!(buf, [7; 2]);
        assert_eq!(ram.mark(address, 2).unwrap_err(), error);
    }
    let end = LOW_SIZE + HIGH_SIZE;
    assert!(ram.write_at(end - 1, &[1; 2]).is_err());
    assert!(ram.write_at(u64::MAX, &[1; 2]).is_err());
    let error = ram.read_at(end - 1, &mut [0; 2]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(ram.host_memory(end, 1).is_none() && ram.host_memory(0, 0).is_none());
    assert!(ram.host_memory(u64::MAX, 1).is_none());
    assert!(ram.dirty_bitmap().is_clean());
    let mut all = vec![1; end as usize];
    ram.read_at(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[rstest]
fn a_given_bitmap_is_marked_at_its_own_addresses(
    #[values(4096, 16384)] page_size: u64,
    #[values(0, 1 << 30)] start: u64,
) {
    let layout = RamLayout::single(1 << 30, 1 << 20).unwrap();
    let dirty = Arc::new(DirtyBitmap::new(start, 1 << 20, page_size).unwrap());
    let options = GuestRam::options().dirty_bitmap(Arc::clone(&dirty));
    let ram = options.allocate(layout).unwrap();
    ram.write((1 << 30) + 0x8000, &[1]).unwrap();
    let expected = std::iter::once(0x8000..0x8000 + page_size);
    assert!(dirty.runs().eq(expected));
    ram.mark_all();
    assert_eq!(dirty.dirty_bytes(), 1 << 20);
}

#[rstest]
fn a_tracked_bitmap_is_marked_in_the_same_way(#[values(4096, 16384)] page_size: u64) {
    let dirty = TrackedBitmap::tracked(0, LOW_SIZE + HIGH_SIZE, page_size).unwrap();
    let options = TrackedRam::options().dirty_bitmap(Arc::new(dirty));
    let ram = options.allocate(layout()).unwrap();
    ram.write(HIGH, &[1]).unwrap();
    ram.mark(0x8000, 1).unwrap();
    let marked = [0x8000..0x8000 + page_size, LOW_SIZE..LOW_SIZE + page_size];
    assert!(ram.dirty_bitmap().runs().eq(marked));

    let new = TrackedRam::new(layout()).unwrap();
    new.write_at(0, &[1]).unwrap();
    assert!(new.dirty_bitmap().is_dirty(0).unwrap());
}
