//! The memory that an epoch allocates while the guest is paused: what it touches does not grow with
//! the RAM.

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
