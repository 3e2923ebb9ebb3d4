//! Every interleaving of write faults and checkpoints, under
//! `RUSTFLAGS="--cfg memsnap_loom" cargo test -p dirty-bitmap --test loom_tracker --release`.
//!
//! The machine is modelled as a hypervisor has it: whether a page is protected and what a store does are decided as one, as protecting
//! waits until no CPU holds the old translation. The pages' contents are relaxed atomics, so that a checkpoint which takes a mark
//! without the write before it is found too.
//!
//! With `MEMSNAP_THOROUGH=1`, a model with no bound on preemptions is exhaustive; where one is set,
//! it is named at the model. Without it, at most 2 preemptions are tried.

#![cfg(memsnap_loom)]

mod interleavings;

use std::io;
use std::ops::Range;
// Loom's own can't be shared with a bitmap inside; this one only counts, which no interleaving depends on.
use std::sync::Arc;

use dirty_bitmap::{BLOCK_SIZE, Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};
use interleavings::{exhaustively, with_preemptions};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// Two pages to the block.
const PAGE: u64 = BLOCK_SIZE / 2;

struct Guest {
    contents: Vec<AtomicU64>,
    protected: Vec<Mutex<bool>>,
    tracker: WriteTracker,
    /// Opens a block at every fault, whatever the other does.
    whole: WriteTracker,
}

/// The guest's memory, that a call fails on which protects this page.
struct Mmu<'a>(&'a Guest, Option<u64>);

impl Mmu<'_> {
    fn set(&self, range: Range<u64>, protected: bool) {
        for page in range.start / PAGE..range.end / PAGE {
            *self.0.protected[page as usize].lock().unwrap() = protected;
        }
    }
}

impl WriteProtection for Mmu<'_> {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        let failing = self.1.filter(|page| range.contains(&(page * PAGE)));
        self.set(
            range.start..failing.map_or(range.end, |page| page * PAGE),
            true,
        );
        failing.map_or(Ok(()), |_| Err(io::ErrorKind::OutOfMemory.into()))
    }

    fn lift(&self, range: Range<u64>) -> io::Result<()> {
        self.set(range, false);
        Ok(())
    }
}

impl Guest {
    /// Of `pages` pages, all of them protected and clean.
    fn new(pages: u64, policy: Policy) -> Arc<Self> {
        let bitmap = TrackedBitmap::tracked(0, pages * PAGE, PAGE).unwrap();
        let tracker = WriteTracker::new(Arc::new(bitmap), policy).unwrap();
        let guest = Self {
            contents: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            protected: (0..pages).map(|_| Mutex::new(false)).collect(),
            whole: tracker.with_policy(Policy::Blocks),
            tracker,
        };
        guest
            .tracker
            .arm(&Mmu(&guest, None))
            .unwrap()
            .release()
            .unwrap();
        Arc::new(guest)
    }

    /// A vCPU's write: it faults until it finds the page open.
    fn write(&self, tracker: &WriteTracker, page: u64, value: u64) {
        loop {
            {
                let protected = self.protected[page as usize].lock().unwrap();
                if !*protected {
                    self.contents[page as usize].store(value, Relaxed);
                    return;
                }
            }
            let fault = tracker.on_write_fault(page * PAGE, &Mmu(self, None));
            fault.unwrap();
        }
    }

    fn vcpu(self: &Arc<Self>, writes: &'static [(u64, u64)]) -> thread::JoinHandle<()> {
        self.vcpu_by(|guest| &guest.tracker, writes)
    }

    fn vcpu_by(
        self: &Arc<Self>,
        tracker: fn(&Self) -> &WriteTracker,
        writes: &'static [(u64, u64)],
    ) -> thread::JoinHandle<()> {
        let guest = Arc::clone(self);
        thread::spawn(move || {
            for (page, value) in writes {
                guest.write(tracker(&guest), *page, *value);
            }
        })
    }

    fn copy(&self, taken: &TakenBitmap, image: &mut [u64]) {
        for run in taken.runs() {
            for page in run.start / PAGE..run.end / PAGE {
                image[page as usize] = self.contents[page as usize].load(Relaxed);
            }
        }
    }

    fn save(&self, image: &mut [u64]) {
        let epoch = self.tracker.arm(&Mmu(self, None)).unwrap();
        self.copy(epoch.bitmap(), image);
        epoch.release().unwrap();
    }

    /// What is saved once more, now that nobody writes, is what is in memory.
    fn assert_saved(&self, mut image: Vec<u64>) {
        self.save(&mut image);
        let contents: Vec<_> = self
            .contents
            .iter()
            .map(|page| page.load(Relaxed))
            .collect();
        assert_eq!(
            image, contents,
            "a written page is neither in the image nor marked"
        );
    }
}

#[test]
fn a_fault_against_a_checkpoint() {
    exhaustively(|| {
        let guest = Guest::new(1, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1)]);
        let mut image = vec![0];
        guest.save(&mut image);
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

#[test]
fn a_page_that_is_written_again_against_two_checkpoints() {
    exhaustively(|| {
        let guest = Guest::new(1, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1), (0, 2)]);
        let mut image = vec![0];
        guest.save(&mut image);
        guest.save(&mut image);
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

/// At most 4 preemptions.
#[test]
fn two_faults_on_one_page_against_a_checkpoint() {
    with_preemptions(4, || {
        let guest = Guest::new(1, Policy::Pages);
        let vcpus = [guest.vcpu(&[(0, 1)]), guest.vcpu(&[(0, 2)])];
        let mut image = vec![0];
        guest.save(&mut image);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        guest.assert_saved(image);
    });
}

/// At most 4 preemptions.
#[test]
fn two_faults_on_one_block_that_opens_whole_against_a_checkpoint() {
    with_preemptions(4, || {
        let guest = Guest::new(2, Policy::Blocks);
        let vcpus = [guest.vcpu(&[(0, 1)]), guest.vcpu(&[(1, 2)])];
        let mut image = vec![0; 2];
        guest.save(&mut image);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        guest.assert_saved(image);
    });
}

/// The first fault opens its page, the second the rest of the block; the checkpoint changes the block's granularity back and
/// forth. At most 3 preemptions.
#[test]
fn faults_on_a_block_whose_granularity_changes_against_two_checkpoints() {
    with_preemptions(3, || {
        let guest = Guest::new(2, Policy::FaultLimit(1));
        let vcpu = guest.vcpu(&[(0, 1), (1, 2), (0, 3)]);
        let mut image = vec![0; 2];
        guest.save(&mut image);
        guest.save(&mut image);
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

/// What a policy knows of a block is a hint, read without order: whatever it says, no page is lost. One vCPU's faults open their page, the
/// other's the block. At most 4 preemptions.
#[test]
fn faults_on_a_block_that_open_as_much_as_each_likes_against_two_checkpoints() {
    with_preemptions(4, || {
        let guest = Guest::new(2, Policy::Pages);
        let vcpus = [
            guest.vcpu(&[(0, 1), (1, 2)]),
            guest.vcpu_by(|guest| &guest.whole, &[(1, 3)]),
        ];
        let mut image = vec![0; 2];
        guest.save(&mut image);
        guest.save(&mut image);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        guest.assert_saved(image);
    });
}

#[test]
fn a_fault_against_more_of_the_same_save() {
    exhaustively(|| {
        let guest = Guest::new(1, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1)]);
        let mut image = vec![0];
        let mut epoch = guest.tracker.arm(&Mmu(&guest, None)).unwrap();
        guest.copy(epoch.bitmap(), &mut image);
        let more = guest
            .tracker
            .arm_more(&mut epoch, &Mmu(&guest, None))
            .unwrap();
        guest.copy(more, &mut image);
        epoch.release().unwrap();
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

#[test]
fn a_fault_against_a_checkpoint_whose_protection_fails_half_way() {
    exhaustively(|| {
        let guest = Guest::new(2, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1), (1, 2)]);
        let mut image = vec![0; 2];
        if let Ok(epoch) = guest.tracker.arm(&Mmu(&guest, Some(1))) {
            guest.copy(epoch.bitmap(), &mut image);
            epoch.release().unwrap();
        }
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

/// A fault's mark goes to a table that is being left. At most 4 preemptions.
#[test]
fn a_fault_against_a_rebuild_and_a_checkpoint() {
    with_preemptions(4, || {
        let guest = Guest::new(1, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1)]);
        let rebuilder = {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.tracker.bitmap().rebuild(PAGE / 2).unwrap())
        };
        let mut image = vec![0];
        guest.save(&mut image);
        vcpu.join().unwrap();
        rebuilder.join().unwrap();
        guest.assert_saved(image);
    });
}
