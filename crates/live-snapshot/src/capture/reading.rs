//! Reading of the bytes of a capture, for the image.

use std::ops::Range;
use std::sync::PoisonError;

use super::{BATCH_PAGES, Capture, Failure};
use crate::page_states::PageState;
use crate::sync::Ordering;

impl Capture {
    /// Copies the bytes that the RAM had at the point in time. Each byte is read once, by one
    /// thread, in any order. A page is free when all of its bytes were read.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let batch = BATCH_PAGES * self.page_size;
            let left = (batch - offset % batch) as usize;
            let (now, later) = buf.split_at_mut(buf.len().min(left));
            if let Err(failure) = self.read_batch(offset, now) {
                self.fail(failure);
                return Err(self.failure().unwrap_or(Failure::Ended));
            }
            offset += now.len() as u64;
            buf = later;
        }
        Ok(())
    }

    /// Copies the bytes of at most [`BATCH_PAGES`] pages.
    fn read_batch(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let end = offset + buf.len() as u64;
        let mut held = Held {
            capture: self,
            pages: 0..0,
        };
        for page in offset / self.page_size..end.div_ceil(self.page_size) {
            if self.claim(page)? {
                held.add(page);
                continue;
            }
            let page_end = (page + 1) * self.page_size;
            let piece = offset.max(page_end - self.page_size)..end.min(page_end);
            let before = (piece.start - offset) as usize;
            self.copy_held(&mut held, offset, &mut buf[..before])?;
            let bytes = &mut buf[before..(piece.end - offset) as usize];
            let from = (piece.start % self.page_size) as usize;
            let is_last = self.is_read(page, &piece);
            if !self.pool.read(page, from, bytes, is_last) {
                return Err(Failure::Ended);
            }
            if is_last {
                let freed = self.states.change(page, PageState::Pooled, PageState::Free);
                debug_assert_eq!(freed, Ok(()));
            }
        }
        self.copy_held(&mut held, offset, buf)
    }

    /// Claims a page that memory has, or returns `false` for one in the pool.
    fn claim(&self, page: u64) -> Result<bool, Failure> {
        loop {
            if !self.active.load(Ordering::SeqCst) {
                return Err(Failure::Ended);
            }
            match self
                .states
                .change(page, PageState::Pending, PageState::Copying)
            {
                Ok(()) => return Ok(true),
                Err(PageState::Pooled) => return Ok(false),
                // A fault copies it.
                Err(PageState::Copying) => self.wait_for_copy(page),
                Err(PageState::Pending) => {}
                Err(PageState::Free) => {
                    let offset = page * self.page_size;
                    return Err(Failure::NotPending { offset });
                }
            }
        }
    }

    /// Copies the held pages, which are the last ones before the end of `buf`, and ends their copy.
    /// `buf` begins at `offset`.
    fn copy_held(&self, held: &mut Held<'_>, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        if held.pages.is_empty() {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let start = offset.max(held.pages.start * self.page_size);
        self.copy_protected(start, &mut buf[(start - offset) as usize..])?;
        self.end_copies(std::mem::take(&mut held.pages), |page| {
            match self.is_read(page, &(start..end)) {
                true => PageState::Free,
                // The rest of the page is read later.
                false => PageState::Pending,
            }
        });
        Ok(())
    }

    /// Counts the bytes of `read` that are in a page, and returns whether all of its bytes were
    /// read. An image may have smaller pages, which are not read in their order.
    fn is_read(&self, page: u64, read: &Range<u64>) -> bool {
        let start = read.start.max(page * self.page_size);
        let len = read.end.min((page + 1) * self.page_size) - start;
        if len == self.page_size {
            return true;
        }
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = parts.entry(page).or_default();
        *bytes += len;
        let complete = *bytes >= self.page_size;
        if complete {
            parts.remove(&page);
        }
        complete
    }
}

/// Adjacent pages in the state [`Copying`](PageState::Copying). They are pending again on drop.
pub(super) struct Held<'c> {
    pub(super) capture: &'c Capture,
    pub(super) pages: Range<u64>,
}

impl Held<'_> {
    /// Adds the page that follows.
    pub(super) fn add(&mut self, page: u64) {
        if self.pages.is_empty() {
            self.pages.start = page;
        }
        self.pages.end = page + 1;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        self.capture.end_copies(pages, |_| PageState::Pending);
    }
}
