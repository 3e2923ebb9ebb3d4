//! Host writes while other threads write, save and read.

#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use dirty_bitmap::{DirtyBitmap, WriteProtection};
use guest_ram::GuestRam;
use page_reader::{PageReader, RamLayout};
use rstest::rstest;
use test_machine::rounds;
use write_faults::{Memory, Mprotect, PageFaults};

/// A multiple of every page size in the tests.
const PAGE: u64 = 16384;

/// A write fault in the middle of the write shows the state of the marks at that time.
#[test]
fn pages_are_marked_after_their_bytes_are_written() {
    let len = 8 * PAGE;
    let memory = Arc::new(Memory::new(len).unwrap());
    let address = memory.host_memory(0, 1).unwrap().as_ptr().cast_mut();
    let dirty = Arc::new(DirtyBitmap::new(0, len, PAGE).unwrap());
    let options = GuestRam::options().dirty_bitmap(Arc::clone(&dirty));
    let layout = RamLayout::single(0, len).unwrap();
    // SAFETY: `memory` stays mapped until the end of the test, and is accessed by atomic operations
    // only.
    let ram = unsafe { options.adopt(layout, &[NonNull::new(address).unwrap()]) }.unwrap();

    let protection = Mprotect::new(&memory);
    let (faults, early) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let handler = protection.answer({
        let (faults, early) = (Arc::clone(&faults), Arc::clone(&early));
        let (dirty, protection) = (Arc::clone(&dirty), protection.clone());
        move |offset| {
            faults.fetch_add(1, SeqCst);
            let marked = dirty.is_dirty(offset).map_err(io::Error::other)?;
            early.fetch_or(marked, SeqCst);
            let page = offset / PAGE * PAGE;
            protection.unprotect(page..page + PAGE)
        }
    });
    let _handler = handler.unwrap();
    protection.protect(0..len).unwrap();
    ram.write(2 * PAGE - 8, &vec![1; PAGE as usize + 16])
        .unwrap();
    ram.write_at(6 * PAGE, &[1]).unwrap();
    assert_eq!(faults.load(SeqCst), 4);
    assert!(
        !early.load(SeqCst),
        "a page was marked before it was written"
    );
    let marked = [PAGE..4 * PAGE, 6 * PAGE..7 * PAGE];
    assert!(dirty.runs().eq(marked));
}

#[rstest]
fn saves_lose_no_write_of_several_threads(#[values(4096, 16384)] page_size: u64) {
    const THREADS: u64 = 4;
    let layout = RamLayout::new([(0, 16 * PAGE), (4 << 30, 16 * PAGE)]).unwrap();
    let size = layout.ram_size();
    let dirty = Arc::new(DirtyBitmap::new(0, size, page_size).unwrap());
    let options = GuestRam::options().dirty_bitmap(dirty);
    let ram = &options.allocate(layout).unwrap();
    let mut image = vec![0; size as usize];
    let mut save = || {
        let epoch = ram.dirty_bitmap().begin_epoch().unwrap();
        for run in epoch.bitmap().runs() {
            let pages = &mut image[run.start as usize..run.end as usize];
            ram.read_at(run.start, pages).unwrap();
        }
        epoch.release().unwrap();
    };
    thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    for round in 0..rounds(200, 5000) as u64 {
                        // Each thread has its own words of every page.
                        let page = round * 7 % (size / 4096) * 4096;
                        let word = (round + 1).to_ne_bytes();
                        ram.write_at(page + 8 * thread, &word).unwrap();
                    }
                })
            })
            .collect();
        while !writers.iter().all(|writer| writer.is_finished()) {
            save();
        }
    });
    save();
    assert!(ram.dirty_bitmap().is_clean());
    let mut now = vec![0; size as usize];
    ram.read_at(0, &mut now).unwrap();
    assert!(image == now, "a write is in no save");
}

#[test]
#[cfg(target_pointer_width = "64")]
fn a_word_that_the_host_writes_is_never_torn() {
    let ram: GuestRam = GuestRam::new(RamLayout::single(0, PAGE).unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // The words have another alignment in the source than in the RAM.
            let mut bytes = vec![0; PAGE as usize + 1];
            for round in (0_u32..).take_while(|_| !stop.load(SeqCst)) {
                let half = round.to_ne_bytes();
                for part in bytes[1..].chunks_exact_mut(4) {
                    part.copy_from_slice(&half);
                }
                ram.write_at(0, &bytes[1..]).unwrap();
            }
        });
        let mut copy = vec![0; PAGE as usize];
        for _ in 0..rounds(2000, 100_000) {
            ram.read_at(0, &mut copy).unwrap();
            let torn = copy.chunks_exact(8).find(|word| word[..4] != word[4..]);
            if torn.is_some() {
                stop.store(true, SeqCst);
            }
            assert_eq!(torn, None);
        }
        stop.store(true, SeqCst);
    });
}
