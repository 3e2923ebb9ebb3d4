//! Reading guest memory while other threads write it like vCPUs.

#![allow(unsafe_code)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use page_reader::{MappedMemory, PageReader, RamLayout};
use support::{Mapping, PAGE};
use test_machine::rounds;

const SIZE: usize = 4 * PAGE;
const WORDS: usize = SIZE / 8;

/// Returns the words of a mapping, which are written like a guest writes: with single machine
/// stores.
fn words(memory: &Mapping) -> impl Iterator<Item = &AtomicU64> {
    let first = memory.as_ptr().cast::<AtomicU64>();
    // SAFETY: whole words of a page-aligned mapping that the borrow keeps, accessed as atomics
    // only.
    (0..WORDS).map(move |word| unsafe { &*first.add(word) })
}

/// Returns a word with two equal halves, so that a torn word is detected.
fn word_of(round: u32) -> u64 {
    u64::from(round) << 32 | u64::from(round)
}

#[test]
#[cfg(target_pointer_width = "64")]
fn words_written_during_a_copy_are_neither_torn_nor_stale() {
    let memory = Mapping::shared(SIZE);
    let layout = RamLayout::single(0, SIZE as u64).unwrap();
    let guest = MappedMemory::new(layout, [memory.memory()]).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let rounds = 1..;
            for round in rounds.take_while(|_| !stop.load(Relaxed)) {
                for word in words(&memory) {
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
            guest.read_at(0, &mut buf[1..]).unwrap();
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
fn several_threads_read_unchanging_memory() {
    let bytes = support::pattern(SIZE);
    let memory = Mapping::private_with(&bytes);
    let layout = RamLayout::single(0, SIZE as u64).unwrap();
    let guest = MappedMemory::new(layout, [memory.memory()]).unwrap();
    thread::scope(|scope| {
        for start in 0..4_usize {
            let (guest, bytes) = (&guest, &bytes);
            scope.spawn(move || {
                for _ in 0..200 {
                    let mut buf = vec![0; SIZE - start];
                    guest.read_at(start as u64, &mut buf).unwrap();
                    assert!(buf == bytes[start..]);
                }
            });
        }
    });
}
