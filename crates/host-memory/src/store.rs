//! Stores to memory that others access concurrently.

#![allow(unsafe_code)]

use std::iter::repeat_n;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

use crate::memory::WORD;

/// Copies `bytes` to `to`, with a single store for each aligned machine word. Other threads, vCPUs
/// and processes may access the memory concurrently.
///
/// There is no order between words: a concurrent reader may find some of the new bytes. Marks no
/// page as dirty.
///
/// # Safety
/// - The memory is mapped and writable for the length of `bytes`.
/// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
///   pointers, with atomic or volatile operations.
///
/// # Examples
/// ```
/// let mut ram = vec![0; 4096];
/// // SAFETY: the memory is that of the vector, which is borrowed exclusively.
/// unsafe { host_memory::store_bytes(ram[16..21].as_mut_ptr(), b"guest") };
/// assert_eq!(&ram[16..22], b"guest\0");
/// ```
pub unsafe fn store_bytes(to: *mut u8, bytes: &[u8]) {
    let (head, rest) = bytes.split_at(to.align_offset(WORD).min(bytes.len()));
    let (words, tail) = rest.as_chunks::<WORD>();
    let words = words.iter().map(|word| usize::from_ne_bytes(*word));
    let (head, tail) = (head.iter().copied(), tail.iter().copied());
    // SAFETY: the parts add up to the length of `bytes`, and the words begin at an aligned address.
    // The rest is the contract of this function.
    unsafe { store(to, head, words, tail) };
}

/// Writes `len` zeros to `to`, as [`store_bytes`] does.
///
/// # Safety
/// - The memory is mapped and writable for `len` bytes.
/// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
///   pointers, with atomic or volatile operations.
pub unsafe fn store_zeros(to: *mut u8, len: usize) {
    let head = to.align_offset(WORD).min(len);
    let (words, tail) = ((len - head) / WORD, (len - head) % WORD);
    let (head, words, tail) = (repeat_n(0, head), repeat_n(0, words), repeat_n(0, tail));
    // SAFETY: as in `store_bytes`, for `len`.
    unsafe { store(to, head, words, tail) };
}

/// Stores bytes, words and bytes one after another.
///
/// # Safety
/// All of them are inside memory for which [`store_bytes`] may be called, and the words begin at an
/// aligned address.
unsafe fn store(
    to: *mut u8,
    head: impl Iterator<Item = u8>,
    words: impl Iterator<Item = usize>,
    tail: impl Iterator<Item = u8>,
) {
    let mut to = to;
    for byte in head {
        // SAFETY: the address is inside the memory. A byte needs no alignment. The reference is to
        // an atomic and exists only for this store, so others may read and write.
        unsafe { (*to.cast::<AtomicU8>()).store(byte, Relaxed) };
        to = to.wrapping_add(1);
    }
    for word in words {
        // SAFETY: as for bytes, and the address is aligned.
        unsafe { (*to.cast::<AtomicUsize>()).store(word, Relaxed) };
        to = to.wrapping_add(WORD);
    }
    for byte in tail {
        // SAFETY: as for the first bytes.
        unsafe { (*to.cast::<AtomicU8>()).store(byte, Relaxed) };
        to = to.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `test` with memory of nonzero bytes, and with ranges of every alignment and length.
    fn for_each_range(test: impl Fn(&mut [u8], std::ops::Range<usize>)) {
        for start in 0..=WORD {
            for end in start..=start + 3 * WORD {
                let mut memory: Vec<u8> = (1..=64).collect();
                test(&mut memory, start..end);
            }
        }
    }

    #[test]
    fn bytes_are_stored_at_every_alignment() {
        for_each_range(|memory, range| {
            let bytes: Vec<u8> = (101..).take(range.len()).collect();
            let mut expected = memory.to_vec();
            expected[range.clone()].copy_from_slice(&bytes);
            // SAFETY: the memory is borrowed exclusively.
            unsafe { store_bytes(memory[range.clone()].as_mut_ptr(), &bytes) };
            assert_eq!(memory, expected, "{range:?}");
        });
    }

    #[test]
    fn zeros_are_stored_at_every_alignment() {
        for_each_range(|memory, range| {
            let mut expected = memory.to_vec();
            expected[range.clone()].fill(0);
            // SAFETY: the memory is borrowed exclusively.
            unsafe { store_zeros(memory[range.clone()].as_mut_ptr(), range.len()) };
            assert_eq!(memory, expected, "{range:?}");
        });
    }
}
