//! A write protection with injected failures and delays.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use dirty_bitmap::WriteProtection;

/// A write protection that forwards every call. Signal handlers call it too, so it only uses
/// atomics.
pub struct Protection {
    inner: Box<dyn WriteProtection<Error = io::Error> + Send + Sync>,
    /// The number of following calls that fail half-way.
    pub(crate) refuse_protect: AtomicU32,
    /// The same for calls that unprotect.
    pub(crate) refuse_unprotect: AtomicU32,
    pub(crate) hold_protect: Hold,
    pub(crate) hold_unprotect: Hold,
    /// Whether each call yields to other threads, which reveals steps in the wrong order.
    yields: bool,
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protection").finish_non_exhaustive()
    }
}

/// A block on one call after it has done its work.
#[derive(Default)]
pub(crate) struct Hold {
    /// The offset of the call to hold. The next call whose range contains it is held.
    offset: AtomicU64,
    wanted: AtomicBool,
    held: AtomicBool,
    go: AtomicBool,
}

impl Protection {
    pub(crate) fn new(
        inner: impl WriteProtection<Error = io::Error> + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner: Box::new(inner),
            refuse_protect: AtomicU32::new(0),
            refuse_unprotect: AtomicU32::new(0),
            hold_protect: Hold::default(),
            hold_unprotect: Hold::default(),
            yields: test_machine::thorough(),
        }
    }

    fn let_others_run(&self) {
        if self.yields {
            thread::yield_now();
        }
    }
}

/// A guard that resumes the held call when it is dropped, also in a panic. Otherwise joining the
/// thread of the call would never return.
#[must_use]
pub(crate) struct Held<'h>(&'h Hold);

impl Hold {
    pub(crate) fn next_call_for(&self, offset: u64) -> Held<'_> {
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
    pub(crate) fn wait_until_held(&self) {
        let start = Instant::now();
        while !self.0.held.load(SeqCst) {
            assert!(start.elapsed() < Duration::from_secs(60), "no call came");
            thread::yield_now();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.go.store(true, SeqCst);
    }
}

/// Returns the part of the range to change, and the result of the call.
fn half_way(refuse: &AtomicU32, range: Range<u64>) -> (Range<u64>, io::Result<()>) {
    let refused = refuse.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1));
    if refused.is_err() {
        return (range, Ok(()));
    }
    // A multiple of every page size in the tests.
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

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        let (range, end) = half_way(&self.refuse_unprotect, range);
        self.let_others_run();
        if !range.is_empty() {
            self.inner.unprotect(range.clone())?;
        }
        self.hold_unprotect.pass(&range);
        self.let_others_run();
        end
    }
}
