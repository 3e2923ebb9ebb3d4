//! A machine whose memory can be write-protected: one word stands for each page.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dirty_bitmap::{Policy, TakenBitmap, TrackedBitmap, WriteProtection, WriteTracker};

/// A call of the tracker's to the platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Protect(Range<u64>),
    Lift(Range<u64>),
}

pub(crate) struct Machine {
    pub(crate) start: u64,
    pub(crate) page_size: u64,
    /// Whether a page is protected is looked at and stored to as one.
    pages: Vec<Mutex<Page>>,
    pub(crate) calls: Mutex<Vec<Call>>,
    /// As many calls still succeed.
    pub(crate) patience: AtomicU64,
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
            patience: AtomicU64::new(u64::MAX),
        }
    }

    pub(crate) fn tracked(&self, policy: Policy) -> WriteTracker {
        let size = self.pages.len() as u64 * self.page_size;
        let bitmap = TrackedBitmap::tracked(self.start, size, self.page_size).unwrap();
        WriteTracker::new(Arc::new(bitmap), policy).unwrap()
    }

    /// A vCPU's write, with its faults; as many as it took.
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

    /// The host's write: no fault, so it marks by itself, last.
    pub(crate) fn host_write(&self, tracker: &WriteTracker, page: u64, word: u64) {
        self.pages[page as usize].lock().unwrap().word = word;
        let address = self.start + page * self.page_size;
        tracker.bitmap().set_dirty(address).unwrap();
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

    /// The calls since this was last asked.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    fn set(&self, range: Range<u64>, protected: bool) -> io::Result<()> {
        let size = self.page_size;
        assert!(range.start.is_multiple_of(size) && range.end.is_multiple_of(size));
        let (first, last) = (range.start - self.start, range.end - self.start);
        let pages = &self.pages[(first / size) as usize..(last / size) as usize];
        // One that fails stops half-way.
        let patience = self
            .patience
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                Some(left.saturating_sub(1))
            });
        let failing = patience == Ok(0);
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

    fn lift(&self, range: Range<u64>) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Lift(range.clone()));
        self.set(range, false)
    }
}
