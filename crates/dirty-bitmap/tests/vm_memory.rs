//! Writes of devices, through the guest memory of the `vm-memory` crate.
#![cfg(all(feature = "vm-memory", not(ramsnap_loom)))]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dirty_bitmap::{
    DirtyBitmap, DirtyBitmapSlice, MarkMemoryError, RegionBitmap, SliceError, Tracked,
    TrackedBitmap, Untracked,
};
use rstest::rstest;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const MIB: u64 = 1 << 20;
/// Guest-physical regions with a gap between them.
const REGIONS: [(u64, u64); 2] = [(0, MIB), (0x1_0000_0000, MIB)];
const HIGH: u64 = REGIONS[1].0;
/// The start of the bitmap: an address, since bitmaps need not start at 0.
const START: u64 = 0x4000;

fn bitmap() -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(START, 2 * MIB, 4096).unwrap())
}

/// Returns guest memory whose regions have the bitmaps that `make` returns for an offset and a
/// size.
fn memory<B: Bitmap>(mut make: impl FnMut(u64, u64) -> B) -> GuestMemoryMmap<B> {
    let mut offset = 0;
    let regions = REGIONS.map(|(start, size)| {
        let mapping = MmapRegionBuilder::new_with_bitmap(size as usize, make(offset, size))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .unwrap();
        offset += size;
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.into()).unwrap()
}

fn marking(bitmap: &Arc<DirtyBitmap>) -> GuestMemoryMmap<DirtyBitmapSlice> {
    memory(|offset, size| DirtyBitmapSlice::new(Arc::clone(bitmap), offset, size).unwrap())
}

fn atomic(page_size: usize) -> GuestMemoryMmap<AtomicBitmap> {
    let page_size = NonZeroUsize::new(page_size).unwrap();
    memory(|_, size| AtomicBitmap::new(size as usize, page_size))
}

/// Returns the memory file: all regions, without the gap.
fn contents<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Vec<u8> {
    let mut bytes = vec![0; 2 * MIB as usize];
    let (low, high) = bytes.split_at_mut(MIB as usize);
    memory.read_slice(low, GuestAddress(0)).unwrap();
    memory.read_slice(high, GuestAddress(HIGH)).unwrap();
    bytes
}

/// Applies a diff to `image`: the pages that an epoch of `bitmap` takes.
fn apply_diff<B: Bitmap>(bitmap: &DirtyBitmap, memory: &GuestMemoryMmap<B>, image: &mut [u8]) {
    let epoch = bitmap.begin_epoch().unwrap();
    for run in epoch.bitmap().runs() {
        let guest_start = if run.start < MIB {
            run.start
        } else {
            HIGH + run.start - MIB
        };
        // A run may reach from one region into the next, but a read may not.
        let low_end = run.end.min(if run.start < MIB { MIB } else { run.end });
        let (low, high) = image[run.start as usize..run.end as usize]
            .split_at_mut((low_end - run.start) as usize);
        memory.read_slice(low, GuestAddress(guest_start)).unwrap();
        memory.read_slice(high, GuestAddress(HIGH)).unwrap();
    }
    epoch.release().unwrap();
}

/// Writes as devices do, by each kind of access, and returns whether a diff has the writes.
fn diff_has_the_writes<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    bitmap: &DirtyBitmap,
    harvest: impl Fn(),
) -> bool {
    let mut image = contents(memory);
    memory
        .write_slice(&[1; 100], GuestAddress(MIB - 100))
        .unwrap();
    memory.write_slice(&[2; 9000], GuestAddress(HIGH)).unwrap();
    memory
        .write_obj(3_u64, GuestAddress(HIGH + 0x8ffc))
        .unwrap();
    memory
        .store(4_u32, GuestAddress(0x5000), Ordering::Relaxed)
        .unwrap();
    let packet = [5; 512];
    memory
        .read_exact_volatile_from(GuestAddress(0x7000), &mut &packet[..], packet.len())
        .unwrap();
    harvest();
    apply_diff(bitmap, memory, &mut image);
    image == contents(memory)
}

#[test]
fn memory_with_slices_of_the_bitmap_marks_by_itself() {
    let bitmap = bitmap();
    assert!(diff_has_the_writes(&marking(&bitmap), &bitmap, || ()));
    assert!(bitmap.is_clean());
}

#[rstest]
#[case::same_page_size(4096)]
#[case::finer(512)]
#[case::coarser(65536)]
#[case::not_a_power_of_two(5000)]
#[case::one_page(MIB as usize)]
fn marks_of_atomic_bitmaps_are_moved(#[case] page_size: usize) {
    let (bitmap, memory) = (bitmap(), atomic(page_size));
    let harvest = || assert!(bitmap.mark_guest_memory(&memory).unwrap() > 0);
    assert!(diff_has_the_writes(&memory, &bitmap, harvest));
    assert_eq!(bitmap.mark_guest_memory(&memory), Ok(0));
    assert!(bitmap.is_clean());
}

#[test]
fn marks_of_optional_atomic_bitmaps_are_moved() {
    let page = NonZeroUsize::new(4096).unwrap();
    let bitmap = bitmap();
    let memory = memory(|_, size| Some(AtomicBitmap::new(size as usize, page)));
    let harvest = || assert!(bitmap.mark_guest_memory(&memory).unwrap() > 0);
    assert!(diff_has_the_writes(&memory, &bitmap, harvest));
}

#[test]
fn memory_without_a_bitmap_loses_the_writes() {
    let bitmap = bitmap();
    assert!(!diff_has_the_writes(&memory(|_, _| ()), &bitmap, || ()));
}

#[test]
fn only_the_written_pages_are_marked() {
    let (bitmap, atomic) = (bitmap(), atomic(4096));
    let expected = [0xff000..0x10_1000, 0x10_8000..0x10_a000];
    let write = |address, len: usize, at: &dyn Fn(&[u8], GuestAddress)| {
        at(&vec![1; len], GuestAddress(address));
    };
    let writes = [(MIB - 1, 1), (HIGH, 1), (HIGH + 0x8fff, 2), (0x3000, 0)];
    let memory = marking(&bitmap);
    for (address, len) in writes {
        write(address, len, &|bytes, at| {
            memory.write_slice(bytes, at).unwrap()
        });
        write(address, len, &|bytes, at| {
            atomic.write_slice(bytes, at).unwrap()
        });
    }
    assert_eq!(bitmap.drain().unwrap().runs().collect::<Vec<_>>(), expected);
    assert_eq!(bitmap.mark_guest_memory(&atomic), Ok(4));
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), expected);
}

#[test]
fn a_slice_reads_the_marks_of_its_region() {
    let bitmap = bitmap();
    let slice = DirtyBitmapSlice::new(Arc::clone(&bitmap), MIB, MIB).unwrap();
    slice.mark_dirty(0x3000, 1);
    assert!(bitmap.is_dirty(START + MIB + 0x3000).unwrap());
    assert!(slice.dirty_at(0x3fff) && !slice.dirty_at(0x4000));
    assert!(slice.clone().slice_at(0x2000).dirty_at(0x1000));
    assert!(!slice.dirty_at(usize::MAX));
}

#[test]
fn a_tracked_bitmap_has_slices_too() {
    let bitmap = Arc::new(TrackedBitmap::tracked(0, 2 * MIB, 4096).unwrap());
    let memory =
        memory(|offset, size| DirtyBitmapSlice::new(Arc::clone(&bitmap), offset, size).unwrap());
    memory.write_obj(1_u8, GuestAddress(HIGH)).unwrap();
    assert!(bitmap.pages().eq([256..257]));
}

#[rstest]
#[case::longer_than_the_ram(MIB, MIB + 1)]
#[case::after_the_ram(2 * MIB + 1, 0)]
#[case::past_the_last_address(u64::MAX, 4096)]
fn a_slice_outside_the_ram_is_refused(#[case] offset: u64, #[case] len: u64) {
    DirtyBitmapSlice::new(bitmap(), offset, len).unwrap_err();
}

#[test]
#[should_panic(expected = "larger than its slice")]
fn a_mark_outside_the_ram_is_not_ignored() {
    let slice = DirtyBitmapSlice::new(bitmap(), MIB, 4096).unwrap();
    slice.mark_dirty(MIB as usize, 1);
}

#[test]
fn memory_that_does_not_fit_the_bitmap_keeps_its_marks() {
    let memory = atomic(4096);
    memory.write_obj(1_u8, GuestAddress(0)).unwrap();
    let smaller = DirtyBitmap::new(0, MIB, 4096).unwrap();
    let error = smaller.mark_guest_memory(&memory).unwrap_err();
    let (memory_size, ram_size) = (2 * MIB, MIB);
    assert_eq!(
        error,
        MarkMemoryError::Size {
            memory_size,
            ram_size
        }
    );
    assert!(smaller.is_clean());
    assert_eq!(bitmap().mark_guest_memory(&memory), Ok(1));
}

#[rstest]
// As `MmapRegionBuilder::new` creates them.
#[case::empty(AtomicBitmap::default())]
#[case::none(None::<AtomicBitmap>)]
fn a_region_without_a_bitmap_of_its_size_is_refused<B: RegionBitmap + Clone>(#[case] of_region: B) {
    let memory = memory(|_, _| of_region.clone());
    let error = bitmap().mark_guest_memory(&memory).unwrap_err();
    let expected = MarkMemoryError::RegionNotTracked {
        guest_start: 0,
        region_size: MIB,
        tracked: 0,
    };
    assert_eq!(error, expected);
}

#[test]
fn slices_of_regions_mark_their_own_pages() {
    let bitmap = bitmap();
    let slices = DirtyBitmapSlice::of_regions(&bitmap, [MIB, MIB]).unwrap();
    let mut slices = slices.into_iter();
    let memory = memory(|_, _| slices.next().unwrap());
    memory.write_obj(1_u8, GuestAddress(HIGH)).unwrap();
    assert!(bitmap.runs().eq([MIB..MIB + 4096]));
    let found = DirtyBitmapSlice::bitmap_of(&memory).unwrap();
    assert!(Arc::ptr_eq(&found.unwrap(), &bitmap));
    DirtyBitmapSlice::of_regions(&bitmap, [MIB, MIB, 1]).unwrap_err();
}

#[test]
fn slices_that_do_not_fit_their_regions_are_found() {
    let bitmap = bitmap();
    let slice = |bitmap: &Arc<DirtyBitmap>, offset| {
        DirtyBitmapSlice::new(Arc::clone(bitmap), offset, MIB).unwrap()
    };
    let of = |memory: &_| DirtyBitmapSlice::<Untracked>::bitmap_of::<DirtyBitmapSlice>(memory);
    let guest_start = HIGH;
    let (offset, expected) = (0, MIB);
    let same_offset = of(&memory(|_, _| slice(&bitmap, 0)));
    let error = SliceError::Offset {
        guest_start,
        offset,
        expected,
    };
    assert_eq!(same_offset.unwrap_err(), error);

    let of_new = of(&memory(|offset, _| slice(&self::bitmap(), offset)));
    assert_eq!(of_new.unwrap_err(), SliceError::OtherBitmap { guest_start });

    let larger = Arc::new(DirtyBitmap::new(0, 3 * MIB, 4096).unwrap());
    let size = of(&memory(|offset, _| slice(&larger, offset)));
    let (memory_size, ram_size) = (2 * MIB, 3 * MIB);
    let error = SliceError::Size {
        memory_size,
        ram_size,
    };
    assert_eq!(size.unwrap_err(), error);
}

#[test]
fn optional_slices_are_those_of_all_regions_or_of_none() {
    let bitmap = bitmap();
    let slice = |offset| DirtyBitmapSlice::new(Arc::clone(&bitmap), offset, MIB).unwrap();
    let of = DirtyBitmapSlice::<Untracked>::bitmap_of::<Option<DirtyBitmapSlice>>;
    let found = of(&memory(|offset, _| Some(slice(offset)))).unwrap();
    assert!(Arc::ptr_eq(&found.unwrap(), &bitmap));
    assert!(of(&memory(|_, _| None)).unwrap().is_none());
    let low_only = of(&memory(|offset, _| (offset == 0).then(|| slice(offset))));
    let guest_start = HIGH;
    assert_eq!(low_only.unwrap_err(), SliceError::NoSlice { guest_start });

    let tracked = DirtyBitmapSlice::<Tracked>::bitmap_of(&marking(&bitmap));
    assert!(tracked.unwrap().is_none(), "slices of another kind");
    assert!(of_no_slices().is_none());
}

fn of_no_slices() -> Option<Arc<DirtyBitmap>> {
    DirtyBitmapSlice::bitmap_of(&atomic(4096)).unwrap()
}

/// Saves while devices write, then once more when they have stopped.
fn save_while_devices_write<B: Bitmap + Sync + Send>(
    memory: &GuestMemoryMmap<B>,
    bitmap: &DirtyBitmap,
    harvest: impl Fn(),
) {
    let mut image = contents(memory);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for device in 1..=2_u64 {
            let stop = &stop;
            scope.spawn(move || {
                let mut value = device;
                while !stop.load(Ordering::Relaxed) {
                    value = value
                        .wrapping_mul(0x5851_f42d_4c95_7f2d)
                        .wrapping_add(device);
                    let (region, page) = ((value >> 63) as usize, value >> 55 & 0xff);
                    let address = REGIONS[region].0 + page * 4096 + device * 8;
                    memory.write_obj(value, GuestAddress(address)).unwrap();
                }
            });
        }
        for _ in 0..50 {
            harvest();
            apply_diff(bitmap, memory, &mut image);
        }
        stop.store(true, Ordering::Relaxed);
    });
    harvest();
    apply_diff(bitmap, memory, &mut image);
    assert!(image == contents(memory), "a diff lacks a write");
}

#[test]
fn no_write_is_lost_while_slices_mark() {
    let bitmap = bitmap();
    save_while_devices_write(&marking(&bitmap), &bitmap, || ());
}

#[test]
fn no_write_is_lost_while_marks_are_moved() {
    let (bitmap, memory) = (bitmap(), atomic(4096));
    save_while_devices_write(&memory, &bitmap, || {
        bitmap.mark_guest_memory(&memory).unwrap();
    });
}
