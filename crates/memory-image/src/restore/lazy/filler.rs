//! What fills the memory: one page and its neighbours for whoever waits, and all the rest in order.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use page_reader::{FlaggedRegion, SecretBuffer};

use super::memory::Memory;
use super::present::Present;
use super::turns::Turns;
use super::userfaultfd::{Filled, Message, Userfaultfd, UserfaultfdError};
use crate::chain::Chain;
use crate::chain::segments::Source;
use crate::error::ImageError;
use crate::working_set::WorkingSet;

/// Bytes that are read and put into memory at a time where nobody waits for them.
const PIECE: u64 = 1 << 20;
/// Bytes that are put into memory at a time, so that a fault need not wait for all of a piece.
const STEP: u64 = 64 << 10;
/// Bytes ahead of that which the disk is told of, so that it reads while they are copied.
const READ_AHEAD: u64 = 4 << 20;
/// Runs of a working set that the kernel is told of before the first of them is read: they are small, and a disk is fast only at many at once.
const RUNS_AHEAD: usize = 256;

#[derive(Debug)]
pub(crate) struct Filler {
    pub(crate) chain: Arc<Chain>,
    pub(crate) memory: Memory,
    /// Whether the memory was mapped for this, and not by a VMM.
    pub(crate) own: bool,
    pub(crate) fault: Userfaultfd,
    /// Whether the kernel can poison a page (Linux 6.6).
    pub(crate) can_poison: bool,
    pub(crate) page: u64,
    /// Bytes, aligned to their number, that one fault brings in at most.
    pub(crate) around: u64,
    /// Pages that no longer come from the images: filled, unreadable, discarded, or unmapped.
    ///
    /// Changed only under the lock of `ledger`, together with the pages themselves: a page that is
    /// missing and settled was discarded, and is zeros.
    pub(crate) settled: Present,
    pub(crate) ledger: Mutex<Ledger>,
    /// Messages other than faults that were read.
    pub(crate) changes: AtomicU64,
    /// The handler waits for the lock of `ledger`. The lock is not fair, so the prefetcher waits until it
    /// has it.
    pub(crate) urgent: AtomicBool,
    /// The prefetcher waits for the lock of `ledger`, or for its turn. Cleared under the lock.
    pub(crate) ahead_waits: AtomicBool,
    /// Signalled when no fault is being answered any more, and when a turn of the prefetcher begins or
    /// ends.
    pub(crate) turn: Condvar,
    pub(crate) recorded: Option<Mutex<WorkingSet>>,
    pub(crate) working_set: Option<WorkingSet>,
    pub(crate) loaded: AtomicU64,
    pub(crate) faults: AtomicU64,
    /// Bytes that the images have, counted when first asked for.
    pub(crate) stored: OnceLock<u64>,
    /// The first error.
    pub(crate) failure: OnceLock<Arc<ImageError>>,
    pub(crate) phase: Mutex<Phase>,
    pub(crate) ended: Condvar,
    /// Whoever fills what nobody waits for is to end.
    pub(crate) stop: AtomicBool,
    /// Missing pages are missing no more: all were filled, or none will be.
    pub(crate) released: AtomicBool,
    /// Readable once whoever answers faults is to end. A pipe would hang up only when no forked child has its other end any more.
    pub(crate) dismissed: EventFd,
}

/// What is known of messages and pages beside [`Filler::settled`].
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Addresses of faults that are to be answered.
    waiting: VecDeque<u64>,
    /// Whose turn it is to fill pages.
    turns: Turns,
    /// Pages that could not be read, and were made inaccessible.
    denied: BTreeSet<u64>,
    /// Ranges that are not in memory any more.
    unmapped: Vec<Range<u64>>,
    /// Addresses from and to which parts of the memory were moved, to be made inaccessible.
    moved: Vec<Range<u64>>,
}

/// Who fills pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The thread that answers faults. It reads the messages, but for the turns of the prefetcher.
    Handler,
    /// A thread that reads ahead.
    Prefetcher,
}

/// How far bringing in everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Not asked for yet.
    Idle,
    /// A thread is at it.
    Running,
    /// All is in, or the error is kept.
    Ended,
}

impl Filler {
    /// Returns the address of the next page that an access waits for, if there is one. Everything that
    /// happened to the memory before the access is noted.
    pub(crate) fn next_fault(&self) -> Result<Option<u64>, ImageError> {
        let mut ledger = self.read_messages()?;
        let ahead_waits = self.ahead_waits.load(Ordering::Relaxed) && !self.stopped();
        if !ledger.waiting.is_empty() && ledger.turns.begin_ahead(ahead_waits) {
            self.turn.notify_all();
            while ledger.turns.is_ahead() && !self.stopped() {
                ledger = self.turn_changes(ledger);
            }
            drop(ledger);
            ledger = self.read_messages()?;
        }
        let next = ledger.waiting.pop_front();
        ledger.turns.answer(next.is_some());
        if next.is_none() {
            self.turn.notify_all();
        }
        Ok(next)
    }

    fn turn_changes<'l>(&self, ledger: MutexGuard<'l, Ledger>) -> MutexGuard<'l, Ledger> {
        let waited = self.turn.wait(ledger);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock, the handler first; the prefetcher once it may fill pages, or is to stop.
    fn lock(&self, by: By) -> MutexGuard<'_, Ledger> {
        match by {
            By::Handler => {
                self.urgent.store(true, Ordering::Relaxed);
                let ledger = locked(&self.ledger);
                self.urgent.store(false, Ordering::Relaxed);
                ledger
            }
            By::Prefetcher => {
                // Before it waits for anything, so that the handler gives it a turn.
                self.ahead_waits.store(true, Ordering::Relaxed);
                while self.urgent.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                let mut ledger = locked(&self.ledger);
                while !ledger.turns.may_read_ahead() && !self.stopped() {
                    ledger = self.turn_changes(ledger);
                }
                self.ahead_waits.store(false, Ordering::Relaxed);
                ledger
            }
        }
    }

    /// Reads all messages, and notes what they say.
    fn read_messages(&self) -> Result<MutexGuard<'_, Ledger>, ImageError> {
        loop {
            // A page must not be filled between the message that it is discarded and the note of that: the
            // discarding thread goes on as soon as the message is read.
            let mut ledger = self.lock(By::Handler);
            self.note_all(&mut ledger)?;
            let Some(moved) = ledger.moved.pop() else {
                return Ok(ledger);
            };
            drop(ledger);
            // The old addresses are mapped still after MREMAP_DONTUNMAP, and are often not after another
            // move: what is there now may not be this memory.
            for registered in still_registered(moved) {
                self.deny_moved(registered);
            }
        }
    }

    /// Reads and notes all messages. Returns how many were no faults.
    fn note_all(&self, ledger: &mut Ledger) -> Result<u32, ImageError> {
        let mut changes = 0;
        while let Some(message) = self.fault.next_message().map_err(wait_error)? {
            changes += u32::from(!matches!(message, Message::Fault(_)));
            self.note(ledger, message);
        }
        Ok(changes)
    }

    /// Ends the prefetcher's turn, if it has one.
    fn end_turn(&self, ledger: &mut Ledger) {
        if ledger.turns.stepped() {
            self.turn.notify_all();
        }
    }

    fn note(&self, ledger: &mut Ledger, message: Message) {
        if let Message::Fault(address) = message {
            return ledger.waiting.push_back(address);
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        let removed = match message {
            Message::Fault(_) => unreachable!("returned above"),
            Message::Removed(addresses) => {
                for pages in self.memory.at(addresses) {
                    ledger.denied.retain(|page| !pages.contains(page));
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
            self.fail(UserfaultfdError::Unmapped { offset, len }.into());
        }
    }

    /// Has accesses to missing pages fail, where memory was moved to or from. Nothing answers their
    /// faults: the pages at the new address are no part of the guest's RAM, and those at the old address
    /// have lost what they held.
    fn deny_moved(&self, moved: Range<u64>) {
        let mut at = moved.start;
        while at < moved.end && self.can_poison {
            let poisoned = self.fault.poison(at, moved.end - at);
            at += poisoned.bytes;
            match poisoned.stop {
                None => {}
                Some(Errno::EEXIST) => at += self.page,
                Some(Errno::EAGAIN) => {
                    // What happens meanwhile to this range, happens to memory that is the VMM's own.
                    let mut ledger = locked(&self.ledger);
                    match self.fault.next_message() {
                        Ok(Some(message)) => self.note(&mut ledger, message),
                        Ok(None) => std::thread::yield_now(),
                        Err(_) => return,
                    }
                }
                // It was unmapped, there.
                Some(_) => at += self.page,
            }
        }
        let denied = match self.can_poison {
            true => self.fault.unregister(moved.start, moved.end - moved.start),
            false => Memory::deny_moved(&self.fault, &moved),
        };
        // Where it fails, the range was unmapped meanwhile.
        let _ = denied;
    }

    /// Fills the page that an access waits for, and what is around it in the same image; if it can't be read, it is poisoned.
    ///
    /// # Errors
    /// Neither can be done.
    pub(crate) fn answer(&self, address: u64, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let Some(page) = self.memory.offset_of(address) else {
            return self.answer_settled(address, None);
        };
        let page = page..page + self.page;
        if self.settled.contains(page.start) {
            return self.answer_settled(address, Some(page.start));
        }
        if let Some(recorded) = &self.recorded {
            locked(recorded).touch(page.clone());
        }
        let before = self.changes.load(Ordering::Relaxed);
        let filled = self
            .fill_around(&page, buffer)
            // It may be only the neighbours that can't be read.
            .or_else(|_| self.fill_page(&page, buffer));
        match filled {
            // The last page came in, or filling was given up, since the fault was taken.
            _ if self.released.load(Ordering::Acquire) => Ok(()),
            // Who has filled the page has woken the access.
            Ok(()) if self.changes.load(Ordering::Relaxed) == before => Ok(()),
            // The page may have been discarded, and not filled.
            Ok(()) => self.answer_settled(address, Some(page.start)),
            Err(error) => {
                self.fail(error);
                self.deny(page)
            }
        }
    }

    /// Answers a fault on a page that does not come from the images: one that was discarded, which is
    /// zeros now; one that was filled since the fault was taken; or one beside the guest's RAM, by which
    /// its mapping has grown.
    fn answer_settled(&self, address: u64, page: Option<u64>) -> Result<(), ImageError> {
        loop {
            let ledger = locked(&self.ledger);
            let is_denied = page.is_some_and(|page| ledger.denied.contains(&page));
            let stop = match is_denied {
                true => Some(Errno::EEXIST),
                false => self.fault.zero(address, self.page).stop,
            };
            drop(ledger);
            match stop {
                Some(Errno::EAGAIN) => self.let_change(By::Handler)?,
                None => return Ok(()),
                // It is there, or not registered any more: the access goes on.
                Some(Errno::EEXIST | Errno::ENOENT) => {
                    let woken = self.fault.wake(address, self.page);
                    return woken.map_err(|errno| fill_error(page.unwrap_or_default(), errno));
                }
                Some(errno) => return Err(fill_error(page.unwrap_or_default(), errno)),
            }
        }
    }

    /// Gives the thread time that is in `madvise`, `munmap` or `mremap`, and with the handler also takes
    /// its message: until it goes on, no page can be filled.
    fn let_change(&self, by: By) -> Result<(), ImageError> {
        if by == By::Handler {
            drop(self.read_messages()?);
        }
        std::thread::yield_now();
        Ok(())
    }

    fn fill_around(&self, page: &Range<u64>, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        let start = page.start - page.start % self.around;
        let around = start..self.clip(start + self.around);
        let in_page = |range: &Range<u64>| range.contains(&page.start);
        let segment = self.chain.segments(around).find(|s| in_page(&s.range));
        let Some(segment) = segment else {
            return self.fill_page(page, buffer);
        };
        // Whole pages of it, the last page of the RAM too where that ends inside.
        let start = segment.range.start.next_multiple_of(self.page);
        let end = match segment.range.end {
            end if end == self.chain.size() => end.next_multiple_of(self.page),
            end => end - end % self.page,
        };
        let whole = start..end;
        if !in_page(&whole) {
            return self.fill_page(page, buffer);
        }
        match segment.source {
            Source::Stored { .. } => self.load(whole, buffer, By::Handler),
            Source::Hole | Source::Zero => self.zero(whole, By::Handler),
        }
    }

    fn fill_page(&self, page: &Range<u64>, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        let bytes = self.read(page, buffer)?;
        self.put(page, bytes, By::Handler)
    }

    /// Brings in everything; nobody waits for it but [`wait`](super::LazyRam::wait).
    pub(crate) fn fill_everything(&self) {
        match self.fill_working_set().and_then(|()| self.fill_stored()) {
            Err(error) => self.fail(error),
            // What is missing now is zeros in the images, and in memory without our doing.
            Ok(()) if !self.stopped() => self.release(),
            Ok(()) => {}
        }
        *locked(&self.phase) = Phase::Ended;
        self.ended.notify_all();
    }

    /// Reads the pages of the working set, and makes pages of it zeros that the images do not
    /// store, as many bytes as they store at most. A page of zeros takes an entry in the page
    /// table, and the working set may name all of the RAM that an image merely claims to have. The
    /// others become zeros when they are touched.
    fn fill_working_set(&self) -> Result<(), ImageError> {
        let Some(working_set) = &self.working_set else {
            return Ok(());
        };
        let mut zeros_left = self.stored_bytes();
        let mut buffer = SecretBuffer::new();
        let (mut told, mut ahead) = (0, working_set.runs());
        for (index, run) in working_set.runs().enumerate() {
            if self.stopped() {
                break;
            }
            if index == told {
                let next = ahead.by_ref().take(RUNS_AHEAD);
                next.for_each(|run| self.will_need(run));
                told += RUNS_AHEAD;
            }
            let start = run.start - run.start % self.page;
            let end = run.end.next_multiple_of(self.page);
            let mut at = start;
            let no_more = end..end;
            for stored in self.stored_pages(start..end).chain([no_more]) {
                let gap = at..stored.start.min(at.saturating_add(zeros_left));
                zeros_left -= gap.end - gap.start;
                self.in_pieces(gap, |piece| self.zero(piece, By::Prefetcher))?;
                at = stored.end;
                self.in_pieces(stored, |piece| {
                    self.load(piece, &mut buffer, By::Prefetcher)
                })?;
            }
        }
        Ok(())
    }

    fn fill_stored(&self) -> Result<(), ImageError> {
        let mut buffer = SecretBuffer::new();
        let mut told = 0;
        let stored = self.stored_pages(0..self.memory.len());
        for run in stored.take_while(|_| !self.stopped()) {
            self.in_pieces(run, |piece| {
                told = piece.start.max(told);
                while told < self.clip(piece.end + READ_AHEAD) {
                    self.will_need(told..told + PIECE);
                    told += PIECE;
                }
                self.load(piece, &mut buffer, By::Prefetcher)
            })?;
        }
        Ok(())
    }

    /// Until there is an error, or it is to stop.
    fn in_pieces(
        &self,
        run: Range<u64>,
        mut each: impl FnMut(Range<u64>) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let starts = run.clone().step_by(PIECE as usize);
        for start in starts.take_while(|_| !self.stopped()) {
            each(start..run.end.min(start + PIECE))?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The runs of the memory's pages of which any byte is in an image.
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

    /// Reads what is missing of the range and puts it into memory.
    fn load(&self, pages: Range<u64>, buffer: &mut SecretBuffer, by: By) -> Result<(), ImageError> {
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
    ) -> Result<&'b [u8], ImageError> {
        let bytes = buffer.sized((pages.end - pages.start) as usize);
        let (stored, past_the_ram) =
            bytes.split_at_mut((self.clip(pages.end) - pages.start) as usize);
        past_the_ram.fill(0);
        self.chain.read(pages.start, stored)?;
        Ok(bytes)
    }

    fn put(&self, pages: &Range<u64>, bytes: &[u8], by: By) -> Result<(), ImageError> {
        self.settle(pages.clone(), by, |address, part| {
            let from = (part.start - pages.start) as usize..(part.end - pages.start) as usize;
            let filled = self.fault.copy(address, &bytes[from]);
            self.loaded.fetch_add(filled.bytes, Ordering::Relaxed);
            filled
        })
    }

    fn zero(&self, pages: Range<u64>, by: By) -> Result<(), ImageError> {
        self.settle(pages, by, |address, part| {
            self.fault.zero(address, part.end - part.start)
        })
    }

    /// Fills what is not settled of `pages` by `fill`, which gets an address and the range that is there.
    ///
    /// # Errors
    /// [`UserfaultfdError::Fill`]. [`UserfaultfdError::Occupied`] where a page is there that is not
    /// settled: it was not filled from the images.
    fn settle(
        &self,
        pages: Range<u64>,
        by: By,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), ImageError> {
        let settled = self.settle_in_turns(pages, by, fill);
        if by == By::Prefetcher {
            // There may have been nothing left to fill in its turn, or an error.
            self.end_turn(&mut locked(&self.ledger));
        }
        settled
    }

    fn settle_in_turns(
        &self,
        pages: Range<u64>,
        by: By,
        fill: impl Fn(u64, &Range<u64>) -> Filled,
    ) -> Result<(), ImageError> {
        let mut rest = pages;
        // The handler does not stop: somebody waits.
        while by == By::Handler || !self.stopped() {
            if self.settled.first_missing(rest.clone()).is_none() {
                break;
            }
            let mut ledger = self.lock(by);
            if by == By::Prefetcher && self.stopped() {
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
            if by == By::Prefetcher && bytes > 0 {
                self.end_turn(&mut ledger);
            }
            match stop {
                None => {}
                Some(Errno::EAGAIN) => {
                    // The handler reads no messages in a turn of the prefetcher, which would wait for ever.
                    if by == By::Prefetcher && ledger.turns.is_ahead() {
                        let changes = self.note_all(&mut ledger)?;
                        if ledger.turns.changed(changes) {
                            self.turn.notify_all();
                        }
                    }
                    drop(ledger);
                    self.let_change(by)?;
                }
                Some(Errno::EEXIST) => {
                    self.make_inaccessible(&mut ledger, next)?;
                    let occupied = || UserfaultfdError::Occupied { offset: next }.into();
                    // Also where it is the neighbour of the page that is asked for.
                    self.fail(occupied());
                    return Err(occupied());
                }
                Some(errno) => return Err(fill_error(next, errno)),
            }
        }
        Ok(())
    }

    /// Makes one page inaccessible, whatever it holds, and wakes whoever waits for it.
    fn make_inaccessible(&self, ledger: &mut Ledger, page: u64) -> Result<(), ImageError> {
        let failed = |errno| fill_error(page, errno);
        self.memory.deny(page..page + self.page).map_err(failed)?;
        ledger.denied.insert(page);
        self.settled.add(page..page + self.page);
        let mut parts = self.memory.parts(page..page + self.page);
        parts.try_for_each(|(address, _)| self.fault.wake(address, self.page).map_err(failed))
    }

    /// The images' bytes end with the RAM, memory with a page.
    fn clip(&self, end: u64) -> u64 {
        end.min(self.chain.size())
    }

    /// Has the disk begin with what is going to be read.
    fn will_need(&self, bytes: Range<u64>) {
        let bytes = self.clip(bytes.start)..self.clip(bytes.end);
        for segment in self.chain.segments(bytes) {
            if let Source::Stored { layer, offset } = segment.source {
                let len = (segment.range.end - segment.range.start) as i64;
                let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
                // Advice: a file that can't be opened is found out by whoever reads it, and a file system that doesn't take it
                // reads when it's asked.
                if let Ok(file) = self.chain.image(layer).file() {
                    let _ = nix::fcntl::posix_fadvise(&*file, offset as i64, len, advice);
                }
            }
        }
    }

    pub(crate) fn stored_bytes(&self) -> u64 {
        *self.stored.get_or_init(|| {
            let runs = self.stored_pages(0..self.memory.len());
            runs.map(|run| run.end - run.start).sum()
        })
    }

    /// Keeps the first error.
    pub(crate) fn fail(&self, error: ImageError) {
        let _ = self.failure.set(Arc::new(error));
    }

    /// Has an access to a page that can't be filled fail, instead of waiting for ever or finding zeros.
    fn deny(&self, page: Range<u64>) -> Result<(), ImageError> {
        loop {
            let mut ledger = locked(&self.ledger);
            let Some((address, _)) = self.memory.parts(page.clone()).next() else {
                return Ok(());
            };
            if self.settled.contains(page.start) {
                drop(ledger);
                return self.answer_settled(address, Some(page.start));
            }
            if !self.can_poison {
                return self.make_inaccessible(&mut ledger, page.start);
            }
            match self.fault.poison(address, self.page).stop {
                None => {
                    ledger.denied.insert(page.start);
                    self.settled.add(page);
                    return Ok(());
                }
                Some(Errno::EAGAIN) => {
                    drop(ledger);
                    self.let_change(By::Handler)?;
                }
                Some(Errno::EEXIST) => return self.make_inaccessible(&mut ledger, page.start),
                Some(errno) => return Err(fill_error(page.start, errno)),
            }
        }
    }

    /// The parts of the memory that are still mapped.
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

    /// No page is missing any more, and nobody has to answer.
    fn release(&self) {
        self.released.store(true, Ordering::Release);
        let mapped = self.mapped();
        let unregister = |range: &Range<u64>| self.memory.unregister(&self.fault, range.clone());
        if let Err(errno) = mapped.iter().try_for_each(unregister) {
            // Some pages may be missing still, to be answered as zeros.
            self.released.store(false, Ordering::Release);
            return self.fail(fill_error(0, errno));
        }
        if let Err(error) = self.memory.give_back(&mapped) {
            self.fail(error.into());
        }
        self.dismiss();
    }

    /// Whoever answers faults is to end.
    pub(crate) fn dismiss(&self) {
        // It can't fail: this is a counter that is far from its end.
        let _ = self.dismissed.write(1);
    }

    /// No missing page will be filled any more: from here on an access to the memory fails, so that none waits for ever or finds zeros.
    pub(crate) fn give_up(&self, why: ImageError) {
        self.fail(why);
        self.shut();
        *locked(&self.phase) = Phase::Ended;
        self.ended.notify_all();
    }

    /// Makes the memory inaccessible.
    pub(crate) fn shut(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // Under the lock, so that the prefetcher sees it or is waiting.
        drop(locked(&self.ledger));
        self.turn.notify_all();
        self.released.store(true, Ordering::Release);
        for range in self.mapped() {
            // Unregistered, missing pages are zeros: only once they are inaccessible.
            let denied = self.memory.deny(range.clone());
            let denied = denied.and_then(|()| self.memory.unregister(&self.fault, range.clone()));
            if let Err(errno) = denied {
                self.fail(fill_error(range.start, errno));
                // Accesses to missing pages wait from now on.
                if let Err(error) = self.fault.leave_open() {
                    self.fail(wait_error(error));
                }
            }
        }
        self.let_changes_end();
    }

    /// Gives up memory that is going to be unmapped.
    pub(crate) fn abandon(&self) {
        if let Err(errno) = self.memory.unregister(&self.fault, 0..self.memory.len()) {
            self.fail(fill_error(0, errno));
        }
        self.let_changes_end();
    }

    /// Lets every thread go on that waits for its message to be read. Nothing is registered any more.
    fn let_changes_end(&self) {
        while self.fault.is_changing() {
            if let Err(error) = self.let_change(By::Handler) {
                return self.fail(error);
            }
        }
    }
}

/// Returns the parts of a range of addresses that are registered with a userfaultfd, or all of it where
/// the kernel does not tell.
fn still_registered(addresses: Range<u64>) -> Vec<Range<u64>> {
    let Ok(mappings) = FlaggedRegion::of_this_process() else {
        return vec![addresses];
    };
    let registered = mappings
        .iter()
        .filter(|mapping| mapping.flags.filled_on_fault);
    let parts = registered.map(|mapping| {
        let Range { start, end } = mapping.region.addresses;
        start.max(addresses.start)..end.min(addresses.end)
    });
    parts.filter(|part| !part.is_empty()).collect()
}

/// Why no message can be read.
pub(crate) fn wait_error(error: std::io::Error) -> ImageError {
    UserfaultfdError::Wait(error).into()
}

fn fill_error(offset: u64, errno: Errno) -> ImageError {
    let source = errno.into();
    UserfaultfdError::Fill { offset, source }.into()
}

/// Nothing that is done under these locks can panic half-way.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
