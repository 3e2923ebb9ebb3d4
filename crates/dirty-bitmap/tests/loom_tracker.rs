//! Loom models of write faults against checkpoints and rebuilding.
//!
//! Run with `RUSTFLAGS="--cfg ramsnap_loom" cargo test -p ramsnap-dirty-bitmap --test loom_tracker
//! --release`.
//!
//! The machine is modeled like a hypervisor: a store checks the protection and writes in one step,
//! because protecting waits until no CPU holds the old translation. The contents of the pages are
//! relaxed atomics, so a checkpoint that takes a mark without the write before it is detected too.
//!
//! With `RAMSNAP_THOROUGH=1`, a model without a bound on preemptions is exhaustive, and other
//! models state their bound. Without it, at most 2 preemptions are tried.

#![cfg(ramsnap_loom)]

#[path = "support/exploration.rs"]
mod exploration;

use std::io;
use std::ops::Range;
// The bitmap takes an `Arc` of std. It only counts references, which no interleaving depends on.
use std::sync::Arc;

use dirty_bitmap::{BLOCK_SIZE, Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};
use exploration::{exhaustively, with_preemptions};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// Half of a block.
const PAGE: u64 = BLOCK_SIZE / 2;

struct Guest {
    contents: Vec<AtomicU64>,
    protected: Vec<Mutex<bool>>,
    tracker: WriteTracker,
    /// A second tracker that unprotects the whole block at every fault.
    whole: WriteTracker,
}

/// The guest's memory. A call that protects the given page fails.
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

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.set(range, false);
        Ok(())
    }
}

impl Guest {
    /// Creates a guest of `pages` pages, all protected and clean.
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
            .checkpoint(&Mmu(&guest, None))
            .unwrap()
            .release()
            .unwrap();
        Arc::new(guest)
    }

    /// Writes as a vCPU does: it faults until the page is unprotected.
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
        let epoch = self.tracker.checkpoint(&Mmu(self, None)).unwrap();
        self.copy(epoch.bitmap(), image);
        epoch.release().unwrap();
    }

    /// Saves again after all writes ended, and asserts that the image equals the memory.
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
fn a_fault_racing_a_checkpoint_is_kept() {
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
fn a_repeated_write_racing_two_checkpoints_is_kept() {
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
fn two_faults_on_a_page_racing_a_checkpoint_are_kept() {
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
fn faults_on_a_whole_block_racing_a_checkpoint_are_kept() {
    with_preemptions(4, || {
        let guest = Guest::new(2, Policy::Blocks);
        let vcpus = [guest.vcpu(&[(0, 1)]), guest.vcpu(&[(1, 2)])];
        let mut image = vec![0; 2];
        guest.save(&mut image);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        guest.assert_saved(image);
    });
}

/// The first fault unprotects its page, the second the rest of the block. The checkpoint switches
/// the block back to pages. At most 3 preemptions.
#[test]
fn faults_racing_a_change_of_granularity_are_kept() {
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

/// The plan of a block is a hint that is read without ordering, and must not affect correctness.
/// The faults of one vCPU unprotect their page, those of the other the block. At most 4
/// preemptions.
#[test]
fn faults_with_different_policies_are_kept() {
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
fn a_fault_racing_an_extended_save_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(1, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1)]);
        let mut image = vec![0];
        let mut epoch = guest.tracker.checkpoint(&Mmu(&guest, None)).unwrap();
        guest.copy(epoch.bitmap(), &mut image);
        let more = guest
            .tracker
            .checkpoint_incremental(&mut epoch, &Mmu(&guest, None))
            .unwrap();
        guest.copy(&more, &mut image);
        epoch.release().unwrap();
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

#[test]
fn a_fault_racing_a_failed_checkpoint_is_kept() {
    exhaustively(|| {
        let guest = Guest::new(2, Policy::Pages);
        let vcpu = guest.vcpu(&[(0, 1), (1, 2)]);
        let mut image = vec![0; 2];
        if let Ok(epoch) = guest.tracker.checkpoint(&Mmu(&guest, Some(1))) {
            guest.copy(epoch.bitmap(), &mut image);
            epoch.release().unwrap();
        }
        vcpu.join().unwrap();
        guest.assert_saved(image);
    });
}

/// The mark of a fault goes to a table that is being replaced. At most 4 preemptions.
#[test]
fn a_fault_racing_a_rebuild_and_a_checkpoint_is_kept() {
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
