//! RAM in guest memory of `vm-memory`: whose bitmap it has.
#![cfg(all(feature = "vm-memory", not(ramsnap_loom)))]

use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, DirtyBitmapSlice, LoggedBitmap, SliceError, TrackedBitmap};
use guest_ram::vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use guest_ram::vm_memory::mmap::MmapRegionBuilder;
use guest_ram::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use guest_ram::{GuestRam, GuestRamError, LoggedRam, TrackedRam};
use nix::libc;
use page_reader::GuestMemoryReader;

const MIB: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;
/// A page size that no new bitmap has, since that is the page size of the host.
const PAGE: u64 = 512;

/// Returns guest memory whose regions have the bitmaps that `make` returns for an offset.
fn memory<B: Bitmap>(mut make: impl FnMut(u64) -> B) -> Arc<GuestMemoryMmap<B>> {
    let regions = [(0, 0), (HIGH, MIB)].map(|(start, offset)| {
        let mapping = MmapRegionBuilder::new_with_bitmap(MIB as usize, make(offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    });
    Arc::new(GuestMemoryMmap::from_regions(regions.into()).unwrap())
}

macro_rules! slices {
    ($bitmap:expr) => {
        memory(|offset| DirtyBitmapSlice::new(Arc::clone(&$bitmap), offset, MIB).unwrap())
    };
}

#[test]
fn ram_has_the_bitmap_that_the_memory_marks() {
    let bitmap = Arc::new(DirtyBitmap::new(0, 2 * MIB, PAGE).unwrap());
    let memory = slices!(bitmap);
    let ram: GuestRam = GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap();
    memory.write_obj(7_u32, GuestAddress(HIGH)).unwrap();
    assert!(ram.dirty_bitmap().runs().eq([MIB..MIB + PAGE]));
    assert!(Arc::ptr_eq(ram.dirty_bitmap(), &bitmap));
    assert!(!ram.marks_elsewhere());

    let logged = Arc::new(LoggedBitmap::logged(0, 2 * MIB, PAGE).unwrap());
    let ram = LoggedRam::from_guest_memory(slices!(logged)).unwrap();
    assert!(Arc::ptr_eq(ram.dirty_bitmap(), &logged));
    let tracked = Arc::new(TrackedBitmap::tracked(0, 2 * MIB, PAGE).unwrap());
    let ram = TrackedRam::from_guest_memory(slices!(tracked)).unwrap();
    assert!(Arc::ptr_eq(ram.dirty_bitmap(), &tracked));
}

#[test]
fn bitmap_of_another_kind_is_refused() {
    let bitmap = Arc::new(DirtyBitmap::new(0, 2 * MIB, PAGE).unwrap());
    let error = LoggedRam::from_guest_memory(slices!(bitmap)).unwrap_err();
    assert!(matches!(error, GuestRamError::BitmapKind), "{error}");
    let logged = Arc::new(LoggedBitmap::logged(0, 2 * MIB, PAGE).unwrap());
    let tracked = TrackedRam::from_guest_memory(slices!(logged)).unwrap_err();
    assert!(matches!(tracked, GuestRamError::BitmapKind), "{tracked}");
    let error = GuestRam::<dirty_bitmap::Untracked>::from_guest_memory(slices!(logged));
    assert!(matches!(error, Err(GuestRamError::BitmapKind)));
}

#[test]
fn slices_that_do_not_fit_their_regions_are_refused() {
    let bitmap = Arc::new(DirtyBitmap::new(0, 2 * MIB, PAGE).unwrap());
    let same = memory(|_| DirtyBitmapSlice::new(Arc::clone(&bitmap), 0, MIB).unwrap());
    let reader = GuestMemoryReader::new(same).unwrap();
    let options = GuestRam::options().dirty_bitmap(Arc::clone(&bitmap));
    let error = options.own(reader.layout().clone(), reader).unwrap_err();
    assert!(
        matches!(
            error,
            GuestRamError::Slices(SliceError::Offset {
                guest_start: HIGH,
                ..
            })
        ),
        "{error}"
    );
}

#[test]
fn other_bitmap_than_the_memory_marks_is_refused() {
    let new = || Arc::new(DirtyBitmap::new(0, 2 * MIB, PAGE).unwrap());
    let bitmap = new();
    // Also through a shared owner.
    let reader = Arc::new(GuestMemoryReader::new(slices!(bitmap)).unwrap());
    let own = |bitmap: Arc<DirtyBitmap>| {
        let options = GuestRam::options().dirty_bitmap(bitmap);
        options.own(reader.layout().clone(), Arc::clone(&reader))
    };
    let error = own(new()).unwrap_err();
    assert!(matches!(error, GuestRamError::OtherBitmap), "{error}");
    assert!(Arc::ptr_eq(
        own(Arc::clone(&bitmap)).unwrap().dirty_bitmap(),
        &bitmap
    ));
}

#[test]
fn marks_of_atomic_bitmaps_are_elsewhere() {
    let atomic = || AtomicBitmap::with_len(MIB as usize);
    let ram: GuestRam = GuestRam::from_guest_memory(memory(|_| atomic())).unwrap();
    assert!(ram.marks_elsewhere() && ram.dirty_bitmap().is_clean());
    let ram: GuestRam = GuestRam::from_guest_memory(memory(|_| Some(atomic()))).unwrap();
    assert!(ram.marks_elsewhere());
    let reader = Arc::new(GuestMemoryReader::new(memory(|_| ())).unwrap());
    let ram: GuestRam = GuestRam::from_owner(reader.layout().clone(), reader).unwrap();
    assert!(!ram.marks_elsewhere());
}
