//! The memory that is allocated by an epoch while the guest is paused, and for a bitmap that is
//! decoded: what it touches does not grow with the RAM.

#![cfg(not(ramsnap_loom))]
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dirty_bitmap::DirtyBitmap;

/// An allocator that counts the requested bytes of each thread. Zeroed bytes count separately,
/// because the host provides them only when they are touched.
struct Counting;

thread_local! {
    static PLAIN: Cell<usize> = const { Cell::new(0) };
    static ZEROED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PLAIN.set(PLAIN.get() + layout.size());
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ZEROED.set(ZEROED.get() + layout.size());
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Returns the plain bytes and the zeroed bytes that `work` allocates, and its result.
fn allocated<T>(work: impl FnOnce() -> T) -> (usize, usize, T) {
    let before = (PLAIN.get(), ZEROED.get());
    let value = work();
    (PLAIN.get() - before.0, ZEROED.get() - before.1, value)
}

const TIB: u64 = 1 << 40;
/// The limit for allocations that do not grow with the RAM.
const LITTLE: usize = 16 << 10;

fn mark_a_few(bitmap: &DirtyBitmap) {
    for page in 0..1000 {
        bitmap.mark(page * (TIB / 1000)).unwrap();
    }
}

#[test]
fn an_epoch_of_1_tib_touches_little_memory() {
    let bitmap = DirtyBitmap::new(0, TIB, 4096).unwrap();
    mark_a_few(&bitmap);
    let (touched, _, epoch) = allocated(|| bitmap.begin_epoch().unwrap());
    assert!(touched < LITTLE, "{touched} bytes");
    assert_eq!(epoch.bitmap().dirty_bytes(), 1000 * 4096);
}

#[test]
fn later_epochs_reuse_the_memory_of_the_first() {
    let bitmap = DirtyBitmap::new(0, TIB, 4096).unwrap();
    for round in 0..3 {
        mark_a_few(&bitmap);
        let (touched, zeroed, mut epoch) = allocated(|| bitmap.begin_epoch().unwrap());
        mark_a_few(&bitmap);
        let (more_touched, more_zeroed, ()) = allocated(|| {
            let _ = epoch.extend().unwrap();
            let _ = epoch.extend().unwrap();
        });
        let new = zeroed + more_zeroed > 0;
        assert!(touched + more_touched < LITTLE, "{touched}, {more_touched}");
        assert_eq!(new, round == 0, "{zeroed}, {more_zeroed}");
        if round == 0 {
            drop(epoch);
        } else {
            epoch.release().unwrap();
        }
    }
}

/// Bytes from an untrusted source name any RAM, in one granule.
#[test]
fn decoding_allocates_for_granules_and_not_for_pages() {
    let granule = TIB;
    let fields = [0, TIB, 64, granule, 1].map(u64::to_le_bytes);
    let bytes = [b"DIRTYBM\x01".as_slice(), fields.as_flattened()].concat();
    let (touched, zeroed, bitmap) = allocated(|| DirtyBitmap::from_bytes(&bytes).unwrap());
    assert!(touched + zeroed < LITTLE, "{touched}, {zeroed}");
    assert_eq!((bitmap.page_size(), bitmap.granule()), (64, granule));
    assert_eq!(bitmap.to_bytes(), bytes);
    // The first table is used again after others.
    bitmap.rebuild(granule / 2).unwrap();
    assert_eq!(bitmap.dirty_bytes(), TIB);
    bitmap.rebuild(granule).unwrap();
    assert_eq!(bitmap.to_bytes(), bytes);
}

#[test]
fn a_decoded_bitmap_is_rebuilt_for_its_pages() {
    let bitmap = DirtyBitmap::new(0x1000, 1 << 20, 4096).unwrap();
    bitmap.rebuild(1 << 16).unwrap();
    bitmap.mark(0x2_0000).unwrap();
    let decoded = DirtyBitmap::from_bytes(&bitmap.to_bytes()).unwrap();
    for each in [&bitmap, &decoded] {
        each.rebuild(4096).unwrap();
        each.mark(0x1000).unwrap();
    }
    assert_eq!(decoded.to_bytes(), bitmap.to_bytes());
    assert_eq!(decoded.page_size(), 4096);
}
