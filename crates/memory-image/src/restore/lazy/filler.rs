//! What fills the memory: one page and its neighbours for whoever waits, and all the rest in order.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use page_reader::SecretBuffer;

use super::memory::Memory;
use super::present::Present;
use super::userfaultfd::{Userfaultfd, UserfaultfdError};
use crate::chain::Chain;
use crate::chain::segments::Source;
use crate::error::ImageError;
use crate::working_set::WorkingSet;

/// Bytes that are read and put into memory at a time where nobody waits for them.
const PIECE: u64 = 1 << 20;
/// Bytes ahead of that which the disk is told of, so that it reads while they are copied.
const READ_AHEAD: u64 = 4 << 20;
/// Runs of a working set that the kernel is told of before the first of them is read: they are small, and a disk is fast only at many at once.
const RUNS_AHEAD: usize = 256;

#[derive(Debug)]
pub(crate) struct Filler {
    pub(crate) chain: Arc<Chain>,
    pub(crate) memory: Memory,
    /// Whether the memory was mapped for this, and not by a monitor.
    pub(crate) own: bool,
    pub(crate) fault: Userfaultfd,
    /// Whether the kernel can poison a page (Linux 6.6).
    pub(crate) can_poison: bool,
    pub(crate) page: u64,
    /// Bytes, aligned to their number, that one fault brings in at most.
    pub(crate) around: u64,
    pub(crate) present: Present,
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
    /// Fills the page that an access waits for, and what is around it in the same image; if it can't be read, it is poisoned.
    ///
    /// # Errors
    /// Neither can be done.
    pub(crate) fn answer(&self, address: u64, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        self.faults.fetch_add(1, Ordering::Relaxed);
        // A foreign address can't be: only the regions are registered.
        let Some(page) = self.memory.offset_of(address) else {
            return Ok(());
        };
        let page = page..page + self.page;
        if let Some(recorded) = &self.recorded
            && !self.present.contains(page.start)
        {
            locked(recorded).touch(page.clone());
        }
        let filled = self
            .fill_around(&page, buffer)
            // It may be only the neighbours that can't be read.
            .or_else(|_| self.fill_page(&page, buffer));
        match filled {
            // Somebody brought in the last page, or gave up, since the fault was taken.
            _ if self.released.load(Ordering::Acquire) => Ok(()),
            Ok(()) => Ok(()),
            Err(error) => {
                self.fail(error);
                self.deny(page)
            }
        }
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
            // Filled already, and missing again: the monitor has thrown it away meanwhile.
            _ if self.present.contains(page.start) => self.fill_page(page, buffer),
            Source::Stored { .. } => self.load(whole, buffer),
            Source::Nowhere | Source::Zeroed => self.zero(whole),
        }
    }

    fn fill_page(&self, page: &Range<u64>, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        let bytes = self.read(page, buffer)?;
        self.put(page, bytes)
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

    fn fill_working_set(&self) -> Result<(), ImageError> {
        let runs: Vec<_> = self.working_set.iter().flat_map(WorkingSet::runs).collect();
        let mut buffer = SecretBuffer::new();
        for runs in runs.chunks(RUNS_AHEAD).take_while(|_| !self.stopped()) {
            runs.iter().for_each(|run| self.will_need(run.clone()));
            for run in runs {
                let start = run.start - run.start % self.page;
                let end = run.end.next_multiple_of(self.page);
                let mut at = start;
                for stored in self.stored_pages(start..end) {
                    self.in_pieces(at..stored.start, |piece| self.zero(piece))?;
                    at = stored.end;
                    self.in_pieces(stored, |piece| self.load(piece, &mut buffer))?;
                }
                self.in_pieces(at..end, |piece| self.zero(piece))?;
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
                self.load(piece, &mut buffer)
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
    fn load(&self, pages: Range<u64>, buffer: &mut SecretBuffer) -> Result<(), ImageError> {
        let mut rest = pages;
        while let Some(missing) = self.present.first_missing(rest.clone()) {
            rest.start = missing.end;
            let bytes = self.read(&missing, buffer)?;
            self.put(&missing, bytes)?;
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

    fn put(&self, pages: &Range<u64>, bytes: &[u8]) -> Result<(), ImageError> {
        for (address, part) in self.memory.parts(pages.clone()) {
            let from = (part.start - pages.start) as usize..(part.end - pages.start) as usize;
            let copied = self.fault.copy(address, &bytes[from]);
            let new = self.filled(part, copied)?;
            self.loaded.fetch_add(new, Ordering::Relaxed);
        }
        Ok(())
    }

    fn zero(&self, pages: Range<u64>) -> Result<(), ImageError> {
        for (address, part) in self.memory.parts(pages) {
            let zeroed = self.fault.zero(address, part.end - part.start);
            self.filled(part, zeroed)?;
        }
        Ok(())
    }

    /// Keeps in mind what was done. Returns how many bytes are new.
    fn filled(&self, pages: Range<u64>, done: nix::Result<()>) -> Result<u64, ImageError> {
        let offset = pages.start;
        done.map_err(|errno| fill_error(offset, errno))?;
        Ok(self.present.add(pages))
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
        for (address, part) in self.memory.parts(page) {
            let offset = part.start;
            let denied = if self.can_poison {
                self.fault.poison(address, self.page)
            } else {
                let denied = self.memory.deny(part);
                denied.and_then(|()| self.fault.wake(address, self.page))
            };
            denied.map_err(|errno| fill_error(offset, errno))?;
        }
        Ok(())
    }

    /// No page is missing any more, and nobody has to answer.
    fn release(&self) {
        self.released.store(true, Ordering::Release);
        let released = self.memory.unregister(&self.fault);
        let inherited = released.and_then(|()| match self.own {
            true => self.memory.inherit(true),
            false => Ok(()),
        });
        if let Err(errno) = inherited {
            self.fail(fill_error(0, errno));
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
        self.released.store(true, Ordering::Release);
        let denied = self.memory.deny(0..self.memory.len());
        let woken = self.memory.unregister(&self.fault);
        if let Err(errno) = denied.and(woken) {
            self.fail(fill_error(0, errno));
        }
    }
}

fn fill_error(offset: u64, errno: Errno) -> ImageError {
    let source = errno.into();
    UserfaultfdError::Fill { offset, source }.into()
}

/// Nothing that is done under these locks can panic half-way.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
