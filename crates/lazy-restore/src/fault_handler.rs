//! The page fault handler: fills the page that an access waits for, and its neighbors.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::LazyError;
use crate::ledger::{Role, locked};
use crate::page_buffer::PageBuffer;
use crate::pages::{Pages, wait_error};
use crate::pause::Pause;
use crate::target::Target;
use crate::userfaultfd::UserfaultfdError;
use crate::working_set::WorkingSet;

/// Handles page faults, in one thread or several.
///
/// One thread at a time waits for faults. If reads are slow, the next thread waits while the first
/// one handles its fault, so that several faults are in flight. If reads are fast, such as from the
/// page cache, one thread handles all faults: to wake another one would take longer than the read.
#[derive(Debug)]
pub(crate) struct PageFaultHandler {
    pages: Arc<Pages>,
    /// Maximum number of bytes that one fault reads, aligned to their length.
    around: u64,
    recorded: Option<Mutex<WorkingSet>>,
    faults: AtomicU64,
    /// Held by the thread that waits for faults.
    waiting: Mutex<()>,
    reads: ReadSpeed,
}

/// Whether the bytes of recent faults were in the page cache.
///
/// Only the reads count. Where several threads handle faults that need no disk, they wait for each
/// other longer than they read.
#[derive(Debug, Default)]
struct ReadSpeed(AtomicU32);

impl ReadSpeed {
    /// The time that a read takes at most if its bytes are in the page cache.
    const FAST: Duration = Duration::from_micros(100);
    /// Reads are fast from this score on. Each fast read adds 1.
    const ENOUGH: u32 = 16;
    const MAX: u32 = 64;
    /// What a slow read subtracts: a thread that was not scheduled for a moment changes nothing.
    const SLOW: u32 = 8;

    fn add(&self, took: Duration) {
        let score = self.0.load(Ordering::Relaxed);
        let next = match took < Self::FAST {
            true => Self::MAX.min(score + 1),
            false => score.saturating_sub(Self::SLOW),
        };
        // An update that is lost changes little.
        self.0.store(next, Ordering::Relaxed);
    }

    fn is_fast(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= Self::ENOUGH
    }
}

impl PageFaultHandler {
    /// Returns a handler that reads at most `around` bytes for a fault, or that records the
    /// touched pages and reads each alone.
    pub(crate) fn new(pages: Arc<Pages>, around: u64, record: bool) -> Self {
        let page_size = pages.page_size();
        let ram_size = pages.source().ram_size();
        Self {
            around: match record {
                true => page_size,
                false => around.clamp(page_size, 1 << 30).next_power_of_two(),
            },
            recorded: record.then(|| Mutex::new(WorkingSet::of(ram_size))),
            faults: AtomicU64::new(0),
            waiting: Mutex::default(),
            reads: ReadSpeed::default(),
            pages,
        }
    }

    /// Returns the number of handled faults.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Returns the pages touched so far, if they are recorded.
    pub(crate) fn recorded(&self) -> Option<WorkingSet> {
        let recorded = self.recorded.as_ref();
        recorded.map(|recorded| locked(recorded).clone())
    }

    /// Handles faults until stopped. Aborts filling on an error.
    pub(crate) fn run(&self) {
        if let Err(error) = self.handle_faults() {
            self.pages.abort(error);
        }
    }

    fn handle_faults(&self) -> Result<(), LazyError> {
        let mut buffer = PageBuffer::new();
        loop {
            let mut waiting = Some(locked(&self.waiting));
            let Some(first) = self.wait_for_fault()? else {
                return Ok(());
            };
            let mut next = Some(first);
            // Handle all faults: a fault that was read does not make the descriptor readable again.
            while let Some(address) = next {
                if !self.reads.is_fast() {
                    waiting = None;
                }
                self.handle_and_count(address, &mut buffer)?;
                next = self.pages.next_fault(1)?;
            }
            drop(waiting);
        }
    }

    /// Waits for a fault. Returns `None` once this thread is to end.
    fn wait_for_fault(&self) -> Result<Option<u64>, LazyError> {
        let (pages, mut is_stopping) = (&self.pages, false);
        let mut pause = Pause::default();
        loop {
            if let Some(address) = pages.next_fault(0)? {
                return Ok(Some(address));
            }
            if is_stopping {
                // Continue while a thread waits for its message to be read.
                if pages.status().has_exited() || !pages.is_changing() {
                    return Ok(None);
                }
                pause.wait();
            }
            let exit = match pages.target() {
                Target::Own(_) => None,
                Target::Peer(peer) => Some(peer.process.exit()),
            };
            let wakes_up = |descriptor| PollFd::new(descriptor, PollFlags::POLLIN);
            let mut ready = [
                wakes_up(pages.messages()),
                wakes_up(pages.status().stopping()),
                wakes_up(pages.bell()),
                // Without a process, one of the others again.
                wakes_up(exit.unwrap_or(pages.bell())),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => _ = polled.map_err(|errno| wait_error(errno.into()))?,
            }
            let [_, stop, bell, last] = ready.map(|ready| ready.any() == Some(true));
            is_stopping = stop;
            if bell {
                pages.silence();
            }
            if last && exit.is_some() {
                pages.end_with_peer();
                return Ok(None);
            }
        }
    }

    fn handle_and_count(&self, address: u64, buffer: &mut PageBuffer) -> Result<(), LazyError> {
        let started = Instant::now();
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.handle_fault(address, buffer)?;
        self.reads.add(buffer.take_read_time());
        self.pages.counters().add_fault(started.elapsed());
        Ok(())
    }

    /// Handles a fault: fills the page and the segment of the source around it.
    /// A page that cannot be read is poisoned.
    ///
    /// # Errors
    /// Fails if the page can be neither filled nor poisoned.
    fn handle_fault(&self, address: u64, buffer: &mut PageBuffer) -> Result<(), LazyError> {
        let Some(page) = self.pages.offset_of(address) else {
            return match self.pages.target() {
                Target::Own(_) => self.pages.handle_settled(address, None),
                Target::Peer(_) => Err(UserfaultfdError::Outside { address }.into()),
            };
        };
        let page = page..page + self.pages.page_size();
        if self.pages.is_settled(page.start) {
            return self.pages.handle_settled(address, Some(page.start));
        }
        if let Some(recorded) = &self.recorded {
            locked(recorded).touch(page.clone());
        }
        let before = self.pages.changes();
        let filled = self
            .fill_around(&page, buffer)
            // Perhaps only the neighbors cannot be read.
            .or_else(|_| self.pages.load_all(&page, &page, buffer, Role::Handler));
        match filled {
            // The last page was filled, or filling was aborted, after the fault was received.
            _ if self.pages.status().is_finished() => Ok(()),
            // Filling the page has woken the access.
            Ok(()) if self.pages.changes() == before => Ok(()),
            // The page may have been discarded instead of filled.
            Ok(()) => self.pages.handle_settled(address, Some(page.start)),
            Err(error) => self.pages.give_up(page, error),
        }
    }

    fn fill_around(&self, page: &Range<u64>, buffer: &mut PageBuffer) -> Result<(), LazyError> {
        let (pages, page_size) = (&self.pages, self.pages.page_size());
        let start = page.start - page.start % self.around;
        let around = start..pages.clip(start + self.around);
        let in_page = |range: &Range<u64>| range.contains(&page.start);
        let segment = pages.source().segment(page.start, around.clone());
        // Whole pages of the segment, including the last page of the RAM if the RAM ends inside it.
        let start = segment.range.start.clamp(around.start, around.end);
        let start = start.next_multiple_of(page_size);
        let end = match segment.range.end.min(around.end) {
            end if end == pages.source().ram_size() => end.next_multiple_of(page_size),
            end => end - end % page_size,
        };
        let whole = start..end;
        if !in_page(&whole) {
            return pages.load_all(page, page, buffer, Role::Handler);
        }
        match segment.zeros {
            false => pages.load_around(page, whole, buffer),
            true => pages.zero(whole, Role::Handler),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_fast_after_some_and_slow_after_several_slow_ones() {
        let (fast, slow) = (Duration::from_micros(20), Duration::from_millis(1));
        let reads = ReadSpeed::default();
        (0..15).for_each(|_| reads.add(fast));
        assert!(!reads.is_fast());
        (0..100).for_each(|_| reads.add(fast));
        assert!(reads.is_fast());
        reads.add(slow);
        assert!(reads.is_fast());
        (0..6).for_each(|_| reads.add(slow));
        assert!(!reads.is_fast());
        (0..100).for_each(|_| reads.add(slow));
        (0..16).for_each(|_| reads.add(fast));
        assert!(reads.is_fast());
    }
}
