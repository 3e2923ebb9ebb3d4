//! A protection that can be told to fail, or to take its time.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use dirty_bitmap::WriteProtection;

/// Passes everything on. Called in signal handlers too, so it has atomics only.
pub struct Protection {
    inner: Box<dyn WriteProtection<Error = io::Error> + Send + Sync>,
    /// As many calls are yet to fail, half-way.
    pub refuse_protect: AtomicU32,
    pub refuse_lift: AtomicU32,
    pub hold_protect: Hold,
    pub hold_lift: Hold,
    /// Whether each call lets other threads run: a step in the wrong order shows.
    yields: bool,
}

/// Keeps one call from returning, when it has done its work.
#[derive(Default)]
pub struct Hold {
    /// The call to be held is the next that has this offset.
    offset: AtomicU64,
    wanted: AtomicBool,
    held: AtomicBool,
    go: AtomicBool,
}

impl Protection {
    pub fn new(inner: impl WriteProtection<Error = io::Error> + Send + Sync + 'static) -> Self {
        Self {
            inner: Box::new(inner),
            refuse_protect: AtomicU32::new(0),
            refuse_lift: AtomicU32::new(0),
            hold_protect: Hold::default(),
            hold_lift: Hold::default(),
            yields: test_machine::thorough(),
        }
    }

    fn let_others_run(&self) {
        if self.yields {
            thread::yield_now();
        }
    }
}

/// The call that is held goes on when this is dropped: in a panic too, or whoever joins its thread would wait for ever.
#[must_use]
pub struct Held<'h>(&'h Hold);

impl Hold {
    pub fn next_call_for(&self, offset: u64) -> Held<'_> {
        self.offset.store(offset, SeqCst);
        self.wanted.store(true, SeqCst);
        Held(self)
    }

    fn pass(&self, range: &Range<u64>) {
        if range.contains(&self.offset.load(SeqCst)) && self.wanted.swap(false, SeqCst) {
            self.held.store(true, SeqCst);
            while !self.go.load(SeqCst) {
                thread::yield_now();
            }
        }
    }
}

impl Held<'_> {
    pub fn wait_until_it_comes(&self) {
        let start = Instant::now();
        while !self.0.held.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(60), "nobody calls");
            thread::yield_now();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.go.store(true, SeqCst);
    }
}

/// The part of the range that is dealt with, and how it ends.
fn half_way(refuse: &AtomicU32, range: Range<u64>) -> (Range<u64>, io::Result<()>) {
    let refused = refuse.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
    if refused.is_err() {
        return (range, Ok(()));
    }
    // A multiple of any page size that the tests have.
    let middle = range.start + (range.end - range.start) / 2 / 0x4000 * 0x4000;
    let failed = io::Error::from(io::ErrorKind::OutOfMemory);
    (range.start..middle, Err(failed))
}

impl WriteProtection for Protection {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        let (range, end) = half_way(&self.refuse_protect, range);
        self.let_others_run();
        if !range.is_empty() {
            self.inner.protect(range.clone())?;
        }
        self.hold_protect.pass(&range);
        self.let_others_run();
        end
    }

    fn lift(&self, range: Range<u64>) -> io::Result<()> {
        let (range, end) = half_way(&self.refuse_lift, range);
        self.let_others_run();
        if !range.is_empty() {
            self.inner.lift(range.clone())?;
        }
        self.hold_lift.pass(&range);
        self.let_others_run();
        end
    }
}
