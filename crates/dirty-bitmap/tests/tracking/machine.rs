//! A simulated machine whose memory can be write-protected. One word stands for each page.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dirty_bitmap::{BLOCK_SIZE, Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};

pub(crate) const PAGE: u64 = 16 << 10;

pub(crate) const PAGES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE;

pub(crate) const START: u64 = 0x8000_0000;

/// A call of the tracker to the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Protect(Range<u64>),
    Unprotect(Range<u64>),
}

pub(crate) struct Machine {
    pub(crate) start: u64,
    pub(crate) page_size: u64,
    /// The lock makes a store check the protection and write the word in one step.
    pages: Vec<Mutex<Page>>,
    pub(crate) calls: Mutex<Vec<Call>>,
    /// The number of calls until one fails. Later calls fail too.
    pub(crate) calls_left: AtomicU64,
}

#[derive(Clone, Copy, Default)]
struct Page {
    word: u64,
    protected: bool,
}

impl Machine {
    pub(crate) fn new(start: u64, pages: u64, page_size: u64) -> Self {
        Self {
            start,
            page_size,
            pages: (0..pages).map(|_| Mutex::default()).collect(),
            calls: Mutex::default(),
            calls_left: AtomicU64::new(u64::MAX),
        }
    }

    pub(crate) fn tracked(&self, policy: Policy) -> WriteTracker {
        let size = self.pages.len() as u64 * self.page_size;
        let bitmap = TrackedBitmap::tracked(self.start, size, self.page_size).unwrap();
        WriteTracker::new(Arc::new(bitmap), policy).unwrap()
    }

    /// Writes as a vCPU does. Returns the number of faults.
    pub(crate) fn write(&self, tracker: &WriteTracker, page: u64, word: u64) -> u64 {
        let mut faults = 0;
        loop {
            let mut at = self.pages[page as usize].lock().unwrap();
            if !at.protected {
                at.word = word;
                return faults;
            }
            drop(at);
            faults += 1;
            tracker
                .on_write_fault(self.start + page * self.page_size, self)
                .unwrap();
        }
    }

    /// Writes as the host does: without a fault, and with the mark afterwards.
    pub(crate) fn host_write(&self, tracker: &WriteTracker, page: u64, word: u64) {
        self.pages[page as usize].lock().unwrap().word = word;
        let address = self.start + page * self.page_size;
        tracker.bitmap().mark(address).unwrap();
    }

    /// Copies the pages of `taken`.
    pub(crate) fn copy(&self, taken: &TakenBitmap, image: &mut [u64]) {
        for run in taken.runs() {
            for page in run.start / self.page_size..run.end.div_ceil(self.page_size) {
                image[page as usize] = self.pages[page as usize].lock().unwrap().word;
            }
        }
    }

    pub(crate) fn words(&self) -> Vec<u64> {
        let words = self.pages.iter().map(|page| page.lock().unwrap().word);
        words.collect()
    }

    /// Returns the calls since this method was last called.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    fn set(&self, range: Range<u64>, protected: bool) -> io::Result<()> {
        let size = self.page_size;
        assert!(range.start.is_multiple_of(size) && range.end.is_multiple_of(size));
        let (first, last) = (range.start - self.start, range.end - self.start);
        let pages = &self.pages[(first / size) as usize..(last / size) as usize];
        // A failing call stops half-way.
        let calls_left = self
            .calls_left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                Some(left.saturating_sub(1))
            });
        let failing = calls_left == Ok(0);
        let done = if failing {
            pages.len() / 2
        } else {
            pages.len()
        };
        for page in &pages[..done] {
            page.lock().unwrap().protected = protected;
        }
        match failing {
            true => Err(io::ErrorKind::OutOfMemory.into()),
            false => Ok(()),
        }
    }
}

impl WriteProtection for Machine {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        self.calls
            .lock()
            .unwrap()
            .push(Call::Protect(range.clone()));
        self.set(range, true)
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.calls
            .lock()
            .unwrap()
            .push(Call::Unprotect(range.clone()));
        self.set(range, false)
    }
}

/// Creates a machine of `blocks` blocks, all protected and clean.
pub(crate) fn protected(blocks: u64, policy: Policy) -> (Machine, WriteTracker) {
    let machine = Machine::new(START, blocks * PAGES_PER_BLOCK, PAGE);
    let tracker = machine.tracked(policy);
    tracker.checkpoint(&machine).unwrap().release().unwrap();
    machine.calls();
    (machine, tracker)
}

/// Makes a checkpoint. Returns the marked runs, in pages from the start of the RAM.
pub(crate) fn checkpoint(machine: &Machine, tracker: &WriteTracker) -> Vec<Range<u64>> {
    let epoch = tracker.checkpoint(machine).unwrap();
    let runs = epoch.bitmap().runs();
    let runs = runs.map(|run| run.start / PAGE..run.end / PAGE).collect();
    epoch.release().unwrap();
    runs
}

/// A platform that refuses some calls without any effect.
pub(crate) struct Refusing<'a, F>(pub(crate) &'a Machine, pub(crate) F);

impl<F: Fn(&Call) -> bool> Refusing<'_, F> {
    fn check(&self, call: Call) -> io::Result<()> {
        match self.1(&call) {
            true => Err(io::ErrorKind::OutOfMemory.into()),
            false => Ok(()),
        }
    }
}

impl<F: Fn(&Call) -> bool> WriteProtection for Refusing<'_, F> {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        self.check(Call::Protect(range.clone()))?;
        self.0.protect(range)
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        self.check(Call::Unprotect(range.clone()))?;
        self.0.unprotect(range)
    }
}
