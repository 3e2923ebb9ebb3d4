//! Deliberate memory errors that `cargo xtask sanitize` must find: `race`, `use-after-free`,
//! `out-of-bounds`.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::thread;

/// A pointer that is shared without synchronization.
struct Shared(*mut u64);

// SAFETY: none: this is the deliberate error.
unsafe impl Send for Shared {}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("race") => race(),
        Some("use-after-free") => use_after_free(),
        Some("out-of-bounds") => out_of_bounds(),
        other => panic!("expected race, use-after-free or out-of-bounds, got {other:?}"),
    }
}

/// Writes to one word from two threads.
fn race() {
    let word = Box::into_raw(Box::new(0));
    let threads = [1, 2].map(|value| {
        let word = Shared(word);
        thread::spawn(move || {
            let word = word;
            // SAFETY: none: the other thread writes too.
            unsafe { *word.0 = value };
        })
    });
    for thread in threads {
        thread.join().expect("the thread only writes");
    }
    // SAFETY: made by `into_raw` above, and the threads have exited.
    drop(unsafe { Box::from_raw(word) });
}

fn use_after_free() {
    let word = Box::into_raw(Box::new(7_u64));
    // SAFETY: made by `into_raw` above.
    drop(unsafe { Box::from_raw(word) });
    // SAFETY: none: it is freed.
    black_box(unsafe { word.read_volatile() });
}

fn out_of_bounds() {
    let words = black_box(vec![7_u64; 4]);
    // SAFETY: none: the array has four elements.
    black_box(unsafe { words.as_ptr().wrapping_add(4).read_volatile() });
}
