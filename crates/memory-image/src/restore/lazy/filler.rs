//! Fills the memory: the page of a fault and its neighbours on demand, and everything else in
//! order.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use page_reader::{FlaggedRegion, SecretBuffer};

use super::error::LazyError;
use super::memory::Memory;
use super::page_bits::PageBits;
use super::turns::Turns;
use super::userfaultfd::{Filled, Message, Userfaultfd, UserfaultfdError};
use crate::chain::Chain;
use crate::chain::segments::Source;
use crate::working_set::WorkingSet;

/// Bytes that the prefetcher reads at a time.
const PIECE: u64 = 1 << 20;
/// Bytes that are filled at a time, so that a fault need not wait for a whole piece.
const STEP: u64 = 64 << 10;
/// Distance of the read-ahead advice, so that the disk reads while bytes are copied.
const READ_AHEAD: u64 = 4 << 20;
/// Runs of a working set for which read-ahead is requested at once. The runs are small, and a disk
/// is fast only with many requests in flight.
const RUNS_AHEAD: usize = 256;

#[derive(Debug)]
pub(crate) struct Filler {
    pub(crate) chain: Arc<Chain>,
    pub(crate) memory: Memory,
    /// Whether the memory was mapped by this crate, and not by a VMM.
    pub(crate) own: bool,
    pub(crate) fault: Userfaultfd,
    /// Whether the kernel can poison pages (Linux 6.6).
    pub(crate) can_poison: bool,
    pub(crate) page: u64,
    /// Maximum number of bytes that one fault reads, aligned to their length.
    pub(crate) around: u64,
    /// Pages that are no longer filled from the images: filled, unreadable, discarded, or unmapped.
    ///
    /// Changed only under the lock of `ledger`, together with the pages themselves. A page that is
    /// missing and settled was discarded, and is zeros.
    pub(crate) settled: PageBits,
    pub(crate) ledger: Mutex<Ledger>,
    /// Number of messages other than faults that were read.
    pub(crate) changes: AtomicU64,
    /// Set while the handler waits for the lock of `ledger`. The lock is not fair, so the
    /// prefetcher waits until the handler has it.
    pub(crate) handler_waits: AtomicBool,
    /// Set while the prefetcher waits for the lock of `ledger`, or for its turn. Cleared under the
    /// lock.
    pub(crate) prefetcher_waits: AtomicBool,
    /// Signalled when no fault is being handled any more, and when a turn of the prefetcher begins
    /// or ends.
    pub(crate) turn: Condvar,
    pub(crate) recorded: Option<Mutex<WorkingSet>>,
    pub(crate) working_set: Option<WorkingSet>,
    pub(crate) loaded: AtomicU64,
    pub(crate) faults: AtomicU64,
    /// Bytes that the images store, counted on first use.
    pub(crate) stored_bytes: OnceLock<u64>,
    /// The first error.
    pub(crate) failure: OnceLock<Arc<LazyError>>,
    pub(crate) phase: Mutex<Phase>,
    pub(crate) ended: Condvar,
    /// Set to stop the prefetcher.
    pub(crate) stop_prefetch: AtomicBool,
    /// Set once fault handling has ended: all pages were filled, or the memory is inaccessible.
    pub(crate) finished: AtomicBool,
    /// Readable once the fault handler is to end. A pipe would not work: a forked child may keep
    /// its other end open.
    pub(crate) stopping: EventFd,
}

/// State of messages and pages, in addition to [`Filler::settled`].
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Addresses of faults that are not handled yet.
    waiting: VecDeque<u64>,
    /// Schedules the handler and the prefetcher.
    turns: Turns,
    /// Pages that could not be read, and were poisoned or made inaccessible.
    inaccessible: BTreeSet<u64>,
    /// Ranges that were unmapped or moved.
    unmapped: Vec<Range<u64>>,
    /// Addresses from and to which parts of the memory were moved. They are to be made
    /// inaccessible.
    moved: Vec<Range<u64>>,
}

/// The thread that fills pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The thread that handles faults. It reads the messages, except in turns of the prefetcher.
    Handler,
    /// A thread that fills pages in the background.
    Prefetcher,
}

/// The state of prefetching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not requested yet.
    Idle,
    /// In progress.
    Running,
    /// Complete, or failed.
    Ended,
}

impl Filler {
    /// Returns the address of the next page that an access waits for, if there is one. Records all
    /// changes of the memory before the access.
    pub(crate) fn next_fault(&self) -> Result<Option<u64>, LazyError> {
        let mut ledger = self.read_messages()?;
        let prefetcher_waits = self.prefetcher_waits.load(Ordering::Relaxed) && !self.stopped();
        if !ledger.waiting.is_empty() && ledger.turns.begin_prefetch(prefetcher_waits) {
            self.turn.notify_all();
            while ledger.turns.is_prefetching() && !self.stopped() {
                ledger = self.turn_changes(ledger);
            }
            drop(ledger);
            ledger = self.read_messages()?;
        }
        let next = ledger.waiting.pop_front();
        ledger.turns.handle(next.is_some());
        if next.is_none() {
            self.turn.notify_all();
        }
        Ok(next)
    }

    fn turn_changes<'l>(&self, ledger: MutexGuard<'l, Ledger>) -> MutexGuard<'l, Ledger> {
        let waited = self.turn.wait(ledger);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock, the handler first. The prefetcher gets it once it may fill pages, or is to
    /// stop.
    fn lock(&self, by: Role) -> MutexGuard<'_, Ledger> {
        match by {
            Role::Handler => {
                self.handler_waits.store(true, Ordering::Relaxed);
                let ledger = locked(&self.ledger);
                self.handler_waits.store(false, Ordering::Relaxed);
                ledger
            }
            Role::Prefetcher => {
                // Set before it waits for anything, so that the handler gives it a turn.
                self.prefetcher_waits.store(true, Ordering::Relaxed);
                while self.handler_waits.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                let mut ledger = locked(&self.ledger);
                while !ledger.turns.may_prefetch() && !self.stopped() {
                    ledger = self.turn_changes(ledger);
                }
                self.prefetcher_waits.store(false, Ordering::Relaxed);
                ledger
            }
        }
    }

    /// Reads and records all messages.
    fn read_messages(&self) -> Result<MutexGuard<'_, Ledger>, LazyError> {
        loop {
            // A page must not be filled after the message that it is discarded is read and before
            // this is recorded: the discarding thread continues as soon as the message is read.
            let mut ledger = self.lock(Role::Handler);
            self.record_messages(&mut ledger)?;
            let Some(moved) = ledger.moved.pop() else {
                return Ok(ledger);
            };
            drop(ledger);
            // After MREMAP_DONTUNMAP the old addresses are still mapped. After another move they
            // often are not, and another mapping may be there now.
            for registered in still_registered(moved) {
                self.revoke_moved_pages(registered);
            }
        }
    }

    /// Reads and records all messages. Returns the number of messages other than faults.
    fn record_messages(&self, ledger: &mut Ledger) -> Result<u32, LazyError> {
        let mut changes = 0;
        while let Some(message) = self.fault.next_message().map_err(wait_error)? {
            changes += u32::from(!matches!(message, Message::Fault(_)));
            self.record_message(ledger, message);
        }
        Ok(changes)
    }

    /// Ends the prefetcher's turn, if it has one.
    fn end_turn(&self, ledger: &mut Ledger) {
        if ledger.turns.stepped() {
            self.turn.notify_all();
        }
    }

    fn record_message(&self, ledger: &mut Ledger, message: Message) {
        if let Message::Fault(address) = message {
            return ledger.waiting.push_back(address);
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        let removed = match message {
            Message::Fault(_) => unreachable!("returned above"),
            Message::Removed(addresses) => {
                for pages in self.memory.at(addresses) {
                    ledger.inaccessible.retain(|page| !pages.contains(page));
                    self.settled.add(pages);
                }
                return;
            }
            Message::Unmapped(addresses) => addresses,
            Message::Moved { from, to } => {
                ledger.moved.push(to..to + (from.end - from.start));
                ledger.moved.push(from.clone());
                from
            }
        };
        for pages in self.memory.at(removed) {
            let (offset, len) = (pages.start, pages.end - pages.start);
            self.settled.add(pages.clone());
            ledger.unmapped.push(pages);
            self.record_error(UserfaultfdError::Unmapped { offset, len }.into());
        }
    }

    /// Makes accesses to missing pages fail where memory was moved to or from. Their faults are not
    /// handled: the pages at the new address are not part of the guest's RAM, and the pages at the
    /// old address have lost their content.
    fn revoke_moved_pages(&self, moved: Range<u64>) {
        let mut at = moved.start;
        while at < moved.end && self.can_poison {
            let poisoned = self.fault.poison(at, moved.end - at);
            at += poisoned.bytes;
            match poisoned.stop {
                None => {}
                Some(Errno::EEXIST) => at += self.page,
                Some(Errno::EAGAIN) => {
                    // Other changes of this range affect only the VMM's own memory.
                    let mut ledger = locked(&self.ledger);
                    match self.fault.next_message() {
                        Ok(Some(message)) => self.record_message(&mut ledger, message),
                        Ok(None) => std::thread::yield_now(),
                        Err(_) => return,
                    }
                }
                // This page was unmapped.
                Some(_) => at += self.page,
            }
        }
        let inaccessible = match self.can_poison {
            true => self.fault.unregister(moved.start, moved.end - moved.start),
            false => Memory::revoke_moved(&self.fault, &moved),
        };
        // It fails only if the range was unmapped meanwhile.
        let _ = inaccessible;
    }

    /// Handles a fault: fills the page and the bytes around it that are adjacent in the same image.
    /// A page that cannot be read is poisoned.
    ///
    /// # Errors
    /// Fails if the page can be neither filled nor poisoned.
    pub(crate) fn handle_fault(
        &self,
        address: u64,
        buffer: &mut SecretBuffer,
    ) -> Result<(), LazyError> {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let Some(page) = self.memory.offset_of(address) else {
            return self.handle_settled(address, None);
        };
        let page = page..page + self.page;
        if self.settled.contains(page.start) {
            return self.handle_settled(address, Some(page.start));
        }
        if let Some(recorded) = &self.recorded {
            locked(recorded).touch(page.clone());
        }
        let before = self.changes.load(Ordering::Relaxed);
        let filled = self
            .fill_around(&page, buffer)
            // Perhaps only the neighbours cannot be read.
            .or_else(|_| self.fill_page(&page, buffer));
        match filled {
            // The last page was filled, or filling was aborted, after the fault was received.
            _ if self.finished.load(Ordering::Acquire) => Ok(()),
            // Role the page has woken the access.
            Ok(()) if self.changes.load(Ordering::Relaxed) == before => Ok(()),
            // The page may have been discarded instead of filled.
            Ok(()) => self.handle_settled(address, Some(page.start)),
            Err(error) => {
                self.record_error(error);
                self.poison(page)
            }
        }
    }

    /// Handles a fault on a page that is not filled from the images: a page that was discarded,
    /// which is zeros now; a page that was filled after the fault was received; or a page outside
    /// the guest's RAM, by which its mapping has grown.
    fn handle_settled(&self, address: u64, page: Option<u64>) -> Result<(), LazyError> {
        loop {
            let ledger = locked(&self.ledger);
            let is_inaccessible = page.is_some_and(|page| ledger.inaccessible.contains(&page));
            let stop = match is_inaccessible {
                true => Some(Errno::EEXIST),
                false => self.fault.zero(address, self.page).stop,
            };
            drop(ledger);
            match stop {
                Some(Errno::EAGAIN) => self.let_changes_continue(Role::Handler)?,
                None => return Ok(()),
                // The page is present, or no longer registered: the access continues.
                Some(Errno::EEXIST | Errno::ENOENT) => {
                    let woken = self.fault.wake(address, self.page);
                    return woken.map_err(|errno| fill_error(page.unwrap_or_default(), errno));
                }
                Some(errno) => return Err(fill_error(page.unwrap_or_default(), errno)),
            }
        }
    }

    /// Lets a thread in `madvise`, `munmap` or `mremap` continue. The handler also reads its
    /// message. No page can be filled until the thread has continued.
    fn let_changes_continue(&self, by: Role) -> Result<(), LazyError> {
        if by == Role::Handler {
            drop(self.read_messages()?);
        }
        std::thread::yield_now();
        Ok(())
    }

    fn fill_around(&self, page: &Range<u64>, buffer: &mut SecretBuffer) -> Result<(), LazyError> {
        let start = page.start - page.start % self.around;
        let around = start..self.clip(start + self.around);
        let in_page = |range: &Range<u64>| range.contains(&page.start);
        let segment = self.chain.segments(around).find(|s| in_page(&s.range));
        let Some(segment) = segment else {
            return self.fill_page(page, buffer);
        };
        // Whole pages of the segment, including the last page of the RAM if the RAM ends inside it.
        let start = segment.range.start.next_multiple_of(self.page);
        let end = match segment.range.end {
            end if end == self.chain.ram_size() => end.next_multiple_of(self.page),
            end => end - end % self.page,
        };
        let whole = start..end;
        if !in_page(&whole) {
            return self.fill_page(page, buffer);
        }
        match segment.source {
            Source::Stored { .. } => self.load(whole, buffer, Role::Handler),
            Source::Hole | Source::Zero => self.zero(whole, Role::Handler),
        }
    }

    fn fill_page(&self, page: &Range<u64>, buffer: &mut SecretBuffer) -> Result<(), LazyError> {
        let bytes = self.read(page, buffer)?;
        self.put(page, bytes, Role::Handler)
    }

    /// Fills all pages in the background. Only [`wait`](super::LazyRam::wait) waits for it.
    pub(crate) fn fill_everything(&self) {
        match self.fill_working_set().and_then(|()| self.fill_stored()) {
            Err(error) => self.record_error(error),
            // Pages that are missing now are zeros in the images, and become zeros on access.
            Ok(()) if !self.stopped() => self.finish(),
            Ok(()) => {}
        }
        *locked(&self.phase) = Phase::Ended;
        self.ended.notify_all();
    }

    /// Fills the pages of the working set. Pages of it that the images do not store are filled with
    /// zeros, up to the number of bytes that the images store. The limit exists because a page of
    /// zeros takes an entry in the page table, and the working set may contain all of the RAM that
    /// an image merely claims. The other pages become zeros on access.
    fn fill_working_set(&self) -> Result<(), LazyError> {
        let Some(working_set) = &self.working_set else {
            return Ok(());
        };
        let mut zeros_left = self.stored_bytes();
        let mut buffer = SecretBuffer::new();
        let (mut advised, mut ahead) = (0, working_set.runs());
        for (index, run) in working_set.runs().enumerate() {
            if self.stopped() {
                break;
            }
            if index == advised {
                let next = ahead.by_ref().take(RUNS_AHEAD);
                next.for_each(|run| self.request_read_ahead(run));
                advised += RUNS_AHEAD;
            }
            let start = run.start - run.start % self.page;
            let end = run.end.next_multiple_of(self.page);
            let mut at = start;
            let no_more = end..end;
            for stored in self.stored_pages(start..end).chain([no_more]) {
                let gap = at..stored.start.min(at.saturating_add(zeros_left));
                zeros_left -= gap.end - gap.start;
                self.in_pieces(gap, |piece| self.zero(piece, Role::Prefetcher))?;
                at = stored.end;
                self.in_pieces(stored, |piece| {
                    self.load(piece, &mut buffer, Role::Prefetcher)
                })?;
            }
        }
        Ok(())
    }

    fn fill_stored(&self) -> Result<(), LazyError> {
        let mut buffer = SecretBuffer::new();
        let mut advised = 0;
        let stored = self.stored_pages(0..self.memory.len());
        for run in stored.take_while(|_| !self.stopped()) {
            self.in_pieces(run, |piece| {
                advised = piece.start.max(advised);
                while advised < self.clip(piece.end + READ_AHEAD) {
                    self.request_read_ahead(advised..advised + PIECE);
                    advised += PIECE;
                }
                self.load(piece, &mut buffer, Role::Prefetcher)
            })?;
        }
        Ok(())
    }

    /// Calls `each` for the pieces of a run until an error, or until stopped.
    fn in_pieces(
        &self,
        run: Range<u64>,
        mut each: impl FnMut(Range<u64>) -> Result<(), LazyError>,
    ) -> Result<(), LazyError> {
        let starts = run.clone().step_by(PIECE as usize);
        for start in starts.take_while(|_| !self.stopped()) {
            each(start..run.end.min(start + PIECE))?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop_prefetch.load(Ordering::Relaxed)
    }

    /// Returns the runs of pages of which an image stores any byte.
    fn stored_pages(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let bytes = within.start..self.clip(within.end);
        let mut stored = self
            .chain
            .segments(bytes)
            .filter(|segment| matches!(segment.source, Source::Stored { .. }))
            .map(|segment| {
                let Range { start, end } = segment.range;
                start - start % self.page..end.next_multiple_of(self.page)
            })
            .peekable();
        std::iter::from_fn(move || {
            let mut run = stored.next()?;
            while let Some(next) = stored.next_if(|next| next.start <= run.end) {
                run.end = next.end;
            }
            Some(run)
        })
    }

    /// Reads the missing pages of the range and fills them.
    fn load(
        &self,
        pages: Range<u64>,
        buffer: &mut SecretBuffer,
        by: Role,
    ) -> Result<(), LazyError> {
        let mut rest = pages;
        while let Some(missing) = self.settled.first_missing(rest.clone()) {
            rest.start = missing.end;
            let bytes = self.read(&missing, buffer)?;
            self.put(&missing, bytes, by)?;
        }
        Ok(())
    }

    fn read<'b>(
        &self,
        pages: &Range<u64>,
        buffer: &'b mut SecretBuffer,
    ) -> Result<&'b [u8], LazyError> {
        let bytes = buffer.sized((pages.end - pages.start) as usize);
        let (stored, past_the_ram) =
            bytes.split_at_mut((self.clip(pages.end) - pages.start) as usize);
        past_the_ram.fill(0);
        self.chain.read(pages.start, stored)?;
        Ok(bytes)
    }

    fn put(&self, pages: &Range<u64>, bytes: &[u8], by: Role) -> Result<(), LazyError> {
        self.settle(pages.clone(), by, |address, part| {
            let from = (part.start - pages.start) as usize..(part.end - pages.start) as usize;
            let filled = self.fault.copy(address, &bytes[from]);
            self.loaded.fetch_add(filled.bytes, Ordering::Relaxed);
            filled
        })
    }

    fn zero(&self, pages: Range<u64>, by: Role) -> Result<(), LazyError> {
        self.settle(pages, by, |address, part| {
            self.fault.zero(address, part.end - part.start)
        })
    }

    /// Fills the pages of `pages` that are not settled by `fill`, which gets an address and the
    /// range at that address.
    ///
    /// # Errors
    /// [`UserfaultfdError::Fill`]. [`UserfaultfdError::Occupied`] if a page that is not settled is
    /// present: something else filled it.
    fn settle(
        &self,
        pages: Range<u64>,
        by: Role,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), LazyError> {
        let settled = self.settle_in_turns(pages, by, fill);
        if by == Role::Prefetcher {
            // The turn may not have ended yet: there was nothing left to fill, or an error.
            self.end_turn(&mut locked(&self.ledger));
        }
        settled
    }

    fn settle_in_turns(
        &self,
        pages: Range<u64>,
        by: Role,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), LazyError> {
        let mut rest = pages;
        // The handler does not stop, because an access waits.
        while by == Role::Handler || !self.stopped() {
            if self.settled.first_missing(rest.clone()).is_none() {
                break;
            }
            let mut ledger = self.lock(by);
            if by == Role::Prefetcher && self.stopped() {
                break;
            }
            let Some(missing) = self.settled.first_missing(rest.clone()) else {
                break;
            };
            let step = missing.start..missing.end.min(missing.start + STEP);
            let part = self.memory.parts(step).next();
            let (address, part) = part.expect("what is missing is a part of the memory");
            let Filled { bytes, stop } = fill(address, &part);
            let done = part.start..part.start + bytes;
            rest.start = done.end;
            let next = done.end;
            self.settled.add(done);
            if by == Role::Prefetcher && bytes > 0 {
                self.end_turn(&mut ledger);
            }
            match stop {
                None => {}
                Some(Errno::EAGAIN) => {
                    // The handler reads no messages in a turn of the prefetcher, which would
                    // otherwise wait forever.
                    if by == Role::Prefetcher && ledger.turns.is_prefetching() {
                        let changes = self.record_messages(&mut ledger)?;
                        if ledger.turns.changed(changes) {
                            self.turn.notify_all();
                        }
                    }
                    drop(ledger);
                    self.let_changes_continue(by)?;
                }
                Some(Errno::EEXIST) => {
                    self.make_inaccessible(&mut ledger, next)?;
                    let occupied = || UserfaultfdError::Occupied { offset: next }.into();
                    // Record it even if the page is only a neighbour of the faulting page.
                    self.record_error(occupied());
                    return Err(occupied());
                }
                Some(errno) => return Err(fill_error(next, errno)),
            }
        }
        Ok(())
    }

    /// Makes one page inaccessible, regardless of its content, and wakes accesses that wait for it.
    fn make_inaccessible(&self, ledger: &mut Ledger, page: u64) -> Result<(), LazyError> {
        let failed = |errno| fill_error(page, errno);
        self.memory
            .make_inaccessible(page..page + self.page)
            .map_err(failed)?;
        ledger.inaccessible.insert(page);
        self.settled.add(page..page + self.page);
        let mut parts = self.memory.parts(page..page + self.page);
        parts.try_for_each(|(address, _)| self.fault.wake(address, self.page).map_err(failed))
    }

    /// Clips an offset to the RAM: the images end with the RAM, the memory with a page.
    fn clip(&self, end: u64) -> u64 {
        end.min(self.chain.ram_size())
    }

    /// Requests read-ahead of these bytes.
    fn request_read_ahead(&self, bytes: Range<u64>) {
        let bytes = self.clip(bytes.start)..self.clip(bytes.end);
        for segment in self.chain.segments(bytes) {
            if let Source::Stored { layer, offset } = segment.source {
                let len = (segment.range.end - segment.range.start) as i64;
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                // Errors are ignored: reading the file reports an error to open it, and a file
                // system without support for the advice reads on demand.
                if let Ok(file) = self.chain.image(layer).file() {
                    let _ = nix::fcntl::posix_fadvise(&*file, offset as i64, len, advice);
                }
            }
        }
    }

    pub(crate) fn stored_bytes(&self) -> u64 {
        *self.stored_bytes.get_or_init(|| {
            let runs = self.stored_pages(0..self.memory.len());
            runs.map(|run| run.end - run.start).sum()
        })
    }

    /// Records an error. Only the first one is kept.
    pub(crate) fn record_error(&self, error: LazyError) {
        let _ = self.failure.set(Arc::new(error));
    }

    /// Makes accesses to a page that cannot be filled fail, instead of waiting forever or finding
    /// zeros.
    fn poison(&self, page: Range<u64>) -> Result<(), LazyError> {
        loop {
            let mut ledger = locked(&self.ledger);
            let Some((address, _)) = self.memory.parts(page.clone()).next() else {
                return Ok(());
            };
            if self.settled.contains(page.start) {
                drop(ledger);
                return self.handle_settled(address, Some(page.start));
            }
            if !self.can_poison {
                return self.make_inaccessible(&mut ledger, page.start);
            }
            match self.fault.poison(address, self.page).stop {
                None => {
                    ledger.inaccessible.insert(page.start);
                    self.settled.add(page);
                    return Ok(());
                }
                Some(Errno::EAGAIN) => {
                    drop(ledger);
                    self.let_changes_continue(Role::Handler)?;
                }
                Some(Errno::EEXIST) => return self.make_inaccessible(&mut ledger, page.start),
                Some(errno) => return Err(fill_error(page.start, errno)),
            }
        }
    }

    /// Returns the parts of the memory that are still mapped.
    fn mapped(&self) -> Vec<Range<u64>> {
        let mut unmapped = locked(&self.ledger).unmapped.clone();
        unmapped.sort_by_key(|range| range.start);
        let (mut mapped, mut at) = (Vec::new(), 0);
        for range in unmapped {
            if at < range.start {
                mapped.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < self.memory.len() {
            mapped.push(at..self.memory.len());
        }
        mapped
    }

    /// Ends filling: no page is missing any more, and no fault needs a handler.
    fn finish(&self) {
        self.finished.store(true, Ordering::Release);
        let mapped = self.mapped();
        let unregister = |range: &Range<u64>| self.memory.unregister(&self.fault, range.clone());
        if let Err(errno) = mapped.iter().try_for_each(unregister) {
            // Some pages may still be missing, and their faults are to be handled with zeros.
            self.finished.store(false, Ordering::Release);
            return self.record_error(fill_error(0, errno));
        }
        if let Err(error) = self.memory.restore_to_children(&mapped) {
            self.record_error(error.into());
        }
        self.stop_handler();
    }

    /// Stops the fault handler.
    pub(crate) fn stop_handler(&self) {
        // It cannot fail: the counter is far from its limit.
        let _ = self.stopping.write(1);
    }

    /// Aborts filling. Every later access to the memory fails, so that none waits forever or finds
    /// zeros.
    pub(crate) fn abort(&self, why: LazyError) {
        self.record_error(why);
        self.revoke();
        *locked(&self.phase) = Phase::Ended;
        self.ended.notify_all();
    }

    /// Makes the memory inaccessible.
    pub(crate) fn revoke(&self) {
        self.stop_prefetch.store(true, Ordering::Relaxed);
        // Take the lock, so that the prefetcher sees the flag or is waiting.
        drop(locked(&self.ledger));
        self.turn.notify_all();
        self.finished.store(true, Ordering::Release);
        for range in self.mapped() {
            // Unregister only inaccessible memory: unregistered missing pages are zeros.
            let inaccessible = self.memory.make_inaccessible(range.clone());
            let inaccessible =
                inaccessible.and_then(|()| self.memory.unregister(&self.fault, range.clone()));
            if let Err(errno) = inaccessible {
                self.record_error(fill_error(range.start, errno));
                // Accesses to missing pages wait from now on.
                if let Err(error) = self.fault.leave_open() {
                    self.record_error(wait_error(error));
                }
            }
        }
        self.drain_changes();
    }

    /// Unregisters memory that is going to be unmapped.
    pub(crate) fn unregister_all(&self) {
        if let Err(errno) = self.memory.unregister(&self.fault, 0..self.memory.len()) {
            self.record_error(fill_error(0, errno));
        }
        self.drain_changes();
    }

    /// Lets every thread continue that waits for its message to be read. Nothing is registered any
    /// more.
    fn drain_changes(&self) {
        while self.fault.is_changing() {
            if let Err(error) = self.let_changes_continue(Role::Handler) {
                return self.record_error(error);
            }
        }
    }
}

/// Returns the parts of a range of addresses that are registered with a userfaultfd, or all of it
/// if the kernel does not report this.
fn still_registered(addresses: Range<u64>) -> Vec<Range<u64>> {
    let Ok(mappings) = FlaggedRegion::of_this_process() else {
        return vec![addresses];
    };
    let registered = mappings
        .iter()
        .filter(|mapping| mapping.flags.is_some_and(|flags| flags.filled_on_fault));
    let parts = registered.map(|mapping| {
        let Range { start, end } = mapping.region.addresses;
        start.max(addresses.start)..end.min(addresses.end)
    });
    parts.filter(|part| !part.is_empty()).collect()
}

/// Returns the error for a failure to read messages.
pub(crate) fn wait_error(error: std::io::Error) -> LazyError {
    UserfaultfdError::Wait(error).into()
}

fn fill_error(offset: u64, errno: Errno) -> LazyError {
    let source = errno.into();
    UserfaultfdError::Fill { offset, source }.into()
}

/// Locks a mutex. Poisoning is ignored: no code panics while it leaves the protected state
/// inconsistent.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
