//! The bytes that the RAM had at one point in time, while it is written by a running guest.

mod reading;
#[cfg(not(ramsnap_loom))]
mod zeros;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::options::WhenPoolFull;
use crate::page_states::{PageState, PageStates};
use crate::pool::{NoBuffer, Pool, PoolUsage};
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering};

/// The number of bytes of RAM that are written together: a chunk of an image, whose checksum is
/// computed while it is written.
pub(crate) const CHUNK_SIZE: u64 = 1 << 20;

/// The number of pages that a read copies at a time. A fault of one of them waits for the copy.
const BATCH_PAGES: u64 = 16;

/// The memory of a guest.
pub(crate) trait PageMemory: Send + Sync {
    /// Copies the bytes at `offset`.
    fn copy(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns whether all pages of a range are write-protected, as far as the platform can say.
    /// Pages that lost their protection without a fault were discarded, and their bytes with them.
    fn is_protected(&self, range: Range<u64>) -> io::Result<bool>;

    /// Returns the offset of a page of a range that is neither write-protected nor marked, as far
    /// as the platform can say: it was discarded.
    fn find_discarded(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        let _ = range;
        Ok(None)
    }
}

/// The reason why a capture has failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    /// Memory could not be read.
    Memory { offset: u64, error: Arc<io::Error> },
    /// A page was discarded before it was copied.
    Discarded { offset: u64 },
    /// The pool was full, and the guest must not wait.
    PoolFull,
    /// A page was read that the image does not need, or that was read before.
    NotPending { offset: u64 },
    /// The capture was ended.
    Ended,
}

impl Failure {
    fn memory(offset: u64, error: io::Error) -> Self {
        let error = Arc::new(error);
        Self::Memory { offset, error }
    }
}

/// A capture of RAM: which pages still have the bytes of the image, and copies of those that do
/// not.
pub(crate) struct Capture {
    states: PageStates,
    pool: Pool,
    memory: Arc<dyn PageMemory>,
    page_size: u64,
    /// Whether the point in time of the image is reached, and the capture has not ended.
    active: AtomicBool,
    failure: Mutex<Option<Failure>>,
    /// Whether all of the RAM is written in the pause: no page may be discarded.
    held: Mutex<bool>,
    released: Condvar,
    /// The number of bytes that were read of pages of which a part was read.
    parts: Mutex<HashMap<u64, u64>>,
    /// The number of threads that wait for the copy of another one.
    waiting: AtomicU64,
    /// Guards no data. A thread that waits holds it from its look at the state on.
    copying: Mutex<()>,
    copied: Condvar,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("pool", &self.pool)
            .field("active", &self.active)
            .finish_non_exhaustive()
    }
}

impl Capture {
    /// Creates a capture of no pages.
    pub(crate) fn new(
        memory: Arc<dyn PageMemory>,
        ram_size: u64,
        page_size: u64,
        pool_pages: usize,
        when_full: WhenPoolFull,
    ) -> Self {
        let chunks = ram_size.div_ceil(CHUNK_SIZE.max(page_size));
        Self {
            states: PageStates::new(ram_size / page_size),
            pool: Pool::new(page_size as usize, pool_pages, chunks, when_full),
            memory,
            page_size,
            active: AtomicBool::new(false),
            failure: Mutex::new(None),
            held: Mutex::new(false),
            released: Condvar::new(),
            parts: Mutex::new(HashMap::new()),
            waiting: AtomicU64::new(0),
            copying: Mutex::new(()),
            copied: Condvar::new(),
        }
    }

    /// Returns the size of a chunk: at least a page.
    pub(crate) fn chunk_size(&self) -> u64 {
        CHUNK_SIZE.max(self.page_size)
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn usage(&self) -> PoolUsage {
        self.pool.usage()
    }

    /// Adds pages to the image. The point in time is not reached yet.
    pub(crate) fn add(&self, range: Range<u64>) {
        debug_assert!(!self.active.load(Ordering::SeqCst));
        self.states
            .set_pending(range.start / self.page_size..range.end.div_ceil(self.page_size));
    }

    /// Returns the runs of bytes of `range` that the image needs and that were not read yet.
    pub(crate) fn needed(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let size = self.page_size;
        let pages = self
            .states
            .needed(range.start / size..range.end.div_ceil(size));
        pages.map(move |run| run.start * size..run.end * size)
    }

    /// Sets the point in time: from now on, [`save`](Self::save) copies. All added pages are
    /// protected, and no fault is being handled.
    pub(crate) fn activate(&self) {
        self.active.store(true, Ordering::SeqCst);
    }

    /// Ends the capture. Threads that wait for room in the pool, or until the RAM may be discarded,
    /// continue.
    pub(crate) fn end(&self) {
        self.active.store(false, Ordering::SeqCst);
        self.pool.end();
        self.set_held(false);
    }

    /// Sets whether all of the RAM is written in the pause.
    pub(crate) fn set_held(&self, held: bool) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
        self.released.notify_all();
    }

    /// Returns whether all of the RAM is written in the pause.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_held(&self) -> bool {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while all of the RAM is written in the pause.
    #[cfg(target_os = "linux")]
    pub(crate) fn wait_while_held(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while *held {
            let released = self.released.wait(held);
            held = released.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the capture for a reason, which [`read`](Self::read) returns.
    fn fail(&self, failure: Failure) {
        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(failure);
        drop(first);
        self.end();
    }

    /// Returns the reason of a failure.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Copies the pages of `range` that the image needs to the pool, before they are unprotected.
    ///
    /// Waits while the pool is full. After it returns, the pages may be overwritten.
    pub(crate) fn save(&self, range: Range<u64>) {
        if !self.save_pages(range.clone()) {
            self.check_discarded(range);
        }
    }

    /// Fails the capture if a page of `range`, which is marked next, was discarded unseen. If it
    /// was written since, its bytes are not those of the image.
    ///
    /// A page that a fault has unprotected and not marked yet looks discarded. The caller handles
    /// faults itself, or no fault is being handled.
    pub(crate) fn check_discarded(&self, range: Range<u64>) {
        if !self.active.load(Ordering::SeqCst) {
            return;
        }
        match self.memory.find_discarded(range.clone()) {
            Ok(None) => {}
            Ok(Some(offset)) => self.fail(Failure::Discarded { offset }),
            Err(error) => self.fail(Failure::memory(range.start, error)),
        }
    }

    /// Copies pages to the pool like [`save`](Self::save). Returns whether all of them were copied,
    /// and found to be protected, by this call.
    pub(crate) fn save_pages(&self, range: Range<u64>) -> bool {
        let mut protected = true;
        for page in range.start / self.page_size..range.end.div_ceil(self.page_size) {
            if !self.active.load(Ordering::SeqCst) {
                return false;
            }
            protected &= self.save_page(page);
        }
        protected
    }

    fn save_page(&self, page: u64) -> bool {
        loop {
            match self.states.get(page) {
                PageState::Free | PageState::Pooled => return false,
                PageState::Copying => self.wait_for_copy(page),
                PageState::Pending => {
                    // Taken first: a thread that waits must not hold a page.
                    let mut buffer = match self.pool.take() {
                        Ok(buffer) => buffer,
                        Err(NoBuffer::Ended) => return false,
                        Err(NoBuffer::Full) => {
                            self.fail(Failure::PoolFull);
                            return false;
                        }
                    };
                    let claimed = self
                        .states
                        .change(page, PageState::Pending, PageState::Copying);
                    if claimed.is_err() {
                        self.pool.give_back(buffer);
                        continue;
                    }
                    let offset = page * self.page_size;
                    let bytes = buffer.sized(self.page_size as usize);
                    if let Err(failure) = self.copy_protected(offset, bytes) {
                        self.pool.give_back(buffer);
                        self.end_copies(page..page + 1, |_| PageState::Pending);
                        self.fail(failure);
                        return false;
                    }
                    self.pool.put(page, offset / self.chunk_size(), buffer);
                    self.end_copies(page..page + 1, |_| PageState::Pooled);
                    return true;
                }
            }
        }
    }

    /// Ends the copies of pages that the calling thread has claimed, and wakes threads that wait.
    fn end_copies(&self, pages: Range<u64>, to: impl Fn(u64) -> PageState) {
        if pages.is_empty() {
            return;
        }
        pages.for_each(|page| self.states.end_copy(page, to(page)));
        // An update, not a load: either it sees a waiting thread, or that thread sees the states.
        if self.waiting.fetch_add(0, Ordering::SeqCst) > 0 {
            // A thread that saw the old state waits by now.
            drop(self.copying.lock().unwrap_or_else(PoisonError::into_inner));
            self.copied.notify_all();
        }
    }

    /// Waits while another thread copies a page.
    fn wait_for_copy(&self, page: u64) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        while self.states.get(page) == PageState::Copying {
            let woken = self.copied.wait(copying);
            copying = woken.unwrap_or_else(PoisonError::into_inner);
        }
        drop(copying);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Copies the bytes of pages that the calling thread has set to
    /// [`Copying`](PageState::Copying), and checks that they were not discarded.
    fn copy_protected(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let failed = |error| Failure::memory(offset, error);
        self.memory.copy(offset, buf).map_err(failed)?;
        // After the copy: a fault unprotects these pages only when they are not held any more.
        let end = (offset + buf.len() as u64).next_multiple_of(self.page_size);
        let pages = offset - offset % self.page_size..end;
        match self.memory.is_protected(pages).map_err(failed)? {
            true => Ok(()),
            false => Err(Failure::Discarded { offset }),
        }
    }
}

#[cfg(all(test, ramsnap_loom))]
mod interleavings;

#[cfg(all(test, not(ramsnap_loom)))]
mod tests;
