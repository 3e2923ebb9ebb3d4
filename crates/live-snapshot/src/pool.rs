//! Copies of pages that wait to be written, in bounded memory.

use std::collections::{HashMap, VecDeque};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use host_memory::SecretBuffer;

use crate::options::WhenPoolFull;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// The longest delay of a fault by [`WhenPoolFull::Throttle`].
const MAX_DELAY: Duration = Duration::from_millis(2);

/// The copies of pages that were about to be overwritten.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Mutex<State>,
    freed: Condvar,
    page_size: usize,
    /// The maximum number of pages.
    limit: usize,
    when_full: WhenPoolFull,
}

#[derive(Debug)]
struct State {
    /// Buffers that no page uses.
    spare: Vec<SecretBuffer>,
    /// The number of buffers in use and in `spare`.
    allocated: usize,
    pages: HashMap<u64, SecretBuffer>,
    /// The chunks with pages in the pool, in the order in which they got the first one.
    chunks: VecDeque<u64>,
    /// A bit for each chunk: it is or was in `chunks`, or was written.
    listed: Vec<u64>,
    ended: bool,
    usage: PoolUsage,
}

/// What the pool was used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolUsage {
    /// The number of pages that were copied at a fault.
    pub(crate) copied: u64,
    /// The largest number of pages at a time.
    pub(crate) peak: u64,
    /// The number of faults that waited for room.
    pub(crate) waits: u64,
    /// The time that faults waited for room, or were delayed.
    pub(crate) waited: Duration,
}

/// The reason why no buffer was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoBuffer {
    /// The capture has ended.
    Ended,
    /// The pool is full, and must not be waited for.
    Full,
}

impl Pool {
    /// Creates a pool of at most `limit` pages, for RAM of `chunks` chunks.
    pub(crate) fn new(
        page_size: usize,
        limit: usize,
        chunks: u64,
        when_full: WhenPoolFull,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                spare: Vec::new(),
                allocated: 0,
                pages: HashMap::new(),
                chunks: VecDeque::new(),
                listed: vec![0; chunks.div_ceil(64) as usize],
                ended: false,
                usage: PoolUsage::default(),
            }),
            freed: Condvar::new(),
            page_size,
            limit,
            when_full,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic with the lock held leaves each buffer in one list.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a buffer for a page, and waits for one if the pool is full.
    pub(crate) fn take(&self) -> Result<SecretBuffer, NoBuffer> {
        let mut state = self.lock();
        let mut waiting_since = None;
        let taken = loop {
            if state.ended {
                break Err(NoBuffer::Ended);
            }
            if let Some(buffer) = state.spare.pop() {
                break Ok(buffer);
            }
            if state.allocated < self.limit {
                state.allocated += 1;
                break Ok(SecretBuffer::new());
            }
            match self.when_full {
                WhenPoolFull::Cancel => break Err(NoBuffer::Full),
                WhenPoolFull::Wait | WhenPoolFull::Throttle => {}
            }
            if waiting_since.is_none() {
                waiting_since = Some(Instant::now());
                state.usage.waits += 1;
            }
            state = self
                .freed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        if let Some(since) = waiting_since {
            state.usage.waited += since.elapsed();
        }
        if self.when_full == WhenPoolFull::Throttle {
            let delay = self.delay(state.pages.len());
            state.usage.waited += delay;
            drop(state);
            if !delay.is_zero() {
                std::thread::sleep(delay);
            }
        }
        taken
    }

    /// Returns the delay of a fault when `used` pages are in the pool: none up to half of the pool,
    /// and then proportional to the rest.
    fn delay(&self, used: usize) -> Duration {
        let half = self.limit / 2;
        match used.checked_sub(half) {
            Some(over) => MAX_DELAY.mul_f64(over as f64 / (self.limit - half).max(1) as f64),
            None => Duration::ZERO,
        }
    }

    /// Returns a buffer that was not used.
    pub(crate) fn give_back(&self, buffer: SecretBuffer) {
        self.lock().spare.push(buffer);
        self.freed.notify_one();
    }

    /// Stores the copy of a page of a chunk.
    pub(crate) fn put(&self, page: u64, chunk: u64, buffer: SecretBuffer) {
        let mut state = self.lock();
        state.pages.insert(page, buffer);
        state.usage.copied += 1;
        state.usage.peak = state.usage.peak.max(state.pages.len() as u64);
        if state.list(chunk) {
            state.chunks.push_back(chunk);
        }
    }

    /// Copies bytes of a stored page from the offset `from` on, and removes the page if `remove`.
    /// Returns whether the page is stored.
    pub(crate) fn read(&self, page: u64, from: usize, buf: &mut [u8], remove: bool) -> bool {
        let mut state = self.lock();
        let Some(stored) = state.pages.get_mut(&page) else {
            return false;
        };
        buf.copy_from_slice(&stored.sized(self.page_size)[from..from + buf.len()]);
        if remove && let Some(buffer) = state.pages.remove(&page) {
            state.spare.push(buffer);
            drop(state);
            self.freed.notify_one();
        }
        true
    }

    /// Returns the chunk that has had pages in the pool for the longest time, once for each chunk.
    pub(crate) fn next_chunk(&self) -> Option<u64> {
        self.lock().chunks.pop_front()
    }

    /// Records that a chunk is being written, so that [`next_chunk`](Self::next_chunk) does not
    /// return it. Returns whether it was not returned before.
    pub(crate) fn list(&self, chunk: u64) -> bool {
        self.lock().list(chunk)
    }

    /// Ends the capture: no thread waits any more.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        // The copies hold guest memory, which is wiped now.
        state.pages = HashMap::new();
        state.spare = Vec::new();
        drop(state);
        self.freed.notify_all();
    }

    pub(crate) fn usage(&self) -> PoolUsage {
        self.lock().usage
    }
}

impl State {
    /// Sets the bit of a chunk. Returns whether it was clear.
    fn list(&mut self, chunk: u64) -> bool {
        let word = &mut self.listed[(chunk / 64) as usize];
        let bit = 1 << (chunk % 64);
        let clear = *word & bit == 0;
        *word |= bit;
        clear
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests;
