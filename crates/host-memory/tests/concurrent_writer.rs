//! Copying memory while other threads write it like vCPUs.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use host_memory::HostMemory;
use test_machine::rounds;

const WORDS: usize = 2048;
const SIZE: usize = WORDS * 8;

/// Returns the memory of `words`, which are written like a guest writes: with single machine
/// stores.
fn memory_of(words: &[AtomicU64]) -> HostMemory<'_> {
    // SAFETY: the borrow keeps the words allocated, and atomics are only written atomically.
    unsafe { HostMemory::new(words.as_ptr().cast(), size_of_val(words)) }
}

/// Returns a word with two equal halves, so that a torn word is detected.
fn word_of(round: u32) -> u64 {
    u64::from(round) << 32 | u64::from(round)
}

#[test]
#[cfg(target_pointer_width = "64")]
fn words_written_during_a_copy_are_neither_torn_nor_stale() {
    let words: Vec<AtomicU64> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
    let memory = memory_of(&words);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let rounds = 1..;
            for round in rounds.take_while(|_| !stop.load(Relaxed)) {
                for word in &words {
                    word.store(word_of(round), Relaxed);
                }
            }
        });
        // The copy has a different alignment in buf than in memory, so that the stores to buf are
        // unaligned.
        let mut buf = vec![0; SIZE + 1];
        let mut last = vec![0; WORDS];
        // A byte-wise copy tears a word well before that many rounds.
        for _ in 0..rounds(10_000, 500_000) {
            memory.copy_to(&mut buf[1..]);
            let copy: Vec<u64> = buf[1..]
                .chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
                .collect();
            for (word, (now, before)) in copy.iter().zip(&last).enumerate() {
                let torn = now >> 32 != now & 0xffff_ffff;
                if torn || now < before {
                    stop.store(true, Relaxed);
                    panic!("word {word} is {now:#x} after {before:#x}");
                }
            }
            last = copy;
        }
        stop.store(true, Relaxed);
    });
}

#[test]
fn several_threads_copy_unchanging_memory() {
    let bytes: Vec<u8> = (0..SIZE)
        .map(|at| (at.wrapping_mul(31) >> 3) as u8)
        .collect();
    let memory = HostMemory::from(&bytes[..]);
    thread::scope(|scope| {
        for start in 0..4_usize {
            let bytes = &bytes;
            scope.spawn(move || {
                for _ in 0..200 {
                    let mut buf = vec![0; SIZE - start];
                    memory.slice(start..SIZE).copy_to(&mut buf);
                    assert!(buf == bytes[start..]);
                }
            });
        }
    });
}
