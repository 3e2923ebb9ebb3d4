//! Filling pages with the bytes of the source, or with zeros.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Pages;
use crate::counters::FillReason;
use crate::error::LazyError;
use crate::ledger::Role;
use crate::page_buffer::PageBuffer;
use crate::target::Target;

impl Pages {
    /// Reads the missing pages of the range and fills them.
    pub(crate) fn load(
        &self,
        pages: Range<u64>,
        buffer: &mut PageBuffer,
        by: Role,
    ) -> Result<(), LazyError> {
        let mut rest = pages;
        while let Some(missing) = self.settled.first_missing(rest.clone()) {
            rest.start = missing.end;
            self.load_all(&missing, &missing, buffer, by)?;
        }
        Ok(())
    }

    /// Reads the missing pages of the range, and fills `page` of them first, which an access waits
    /// for.
    pub(crate) fn load_around(
        &self,
        page: &Range<u64>,
        pages: Range<u64>,
        buffer: &mut PageBuffer,
    ) -> Result<(), LazyError> {
        let mut rest = pages.clone();
        while let Some(missing) = self.settled.first_missing(rest.clone()) {
            rest.start = missing.end;
            if missing.contains(&page.start) {
                self.load_all(&missing, page, buffer, Role::Handler)?;
                break;
            }
        }
        self.load(pages, buffer, Role::Handler)
    }

    /// Reads the missing pages of the range and fills them in the background. For another process,
    /// pages that cannot be read are poisoned, so that the others are filled.
    pub(crate) fn prefetch(
        &self,
        pages: Range<u64>,
        buffer: &mut PageBuffer,
        by: Role,
    ) -> Result<(), LazyError> {
        let loaded = self.load(pages.clone(), buffer, by);
        let (Err(error), Target::Peer(_)) = (&loaded, &self.target) else {
            return loaded;
        };
        if self.target.must_end(error) {
            return loaded;
        }
        for start in pages.step_by(self.page_size as usize) {
            let page = start..start + self.page_size;
            if let Err(error) = self.load(page.clone(), buffer, by) {
                self.give_up(page, error)?;
            }
        }
        Ok(())
    }

    /// Records that filling in the background has failed. For another process, filling ends: it
    /// must not depend on pages that are never filled.
    pub(crate) fn prefetch_failed(&self, error: LazyError) {
        match self.target {
            Target::Own(_) => self.status.record_error(error),
            Target::Peer(_) => self.abort(error),
        }
    }

    /// Reads all pages of the range, and fills those that are missing, the `first` ones first.
    pub(crate) fn load_all(
        &self,
        pages: &Range<u64>,
        first: &Range<u64>,
        buffer: &mut PageBuffer,
        by: Role,
    ) -> Result<(), LazyError> {
        let ram_end = self.clip(pages.end);
        let read = buffer.read(self.source(), pages.clone(), ram_end);
        let bytes = read.map_err(|error| LazyError::of_read(pages.start, error))?;
        let fill = |address, part: &Range<u64>| {
            let from = (part.start - pages.start) as usize..(part.end - pages.start) as usize;
            let filled = self.fault.copy(address, &bytes[from]);
            self.loaded.fetch_add(filled.bytes, Ordering::Relaxed);
            self.counters.add_filled(by.reason(), filled.bytes);
            if by == Role::Handler {
                self.loaded_by_faults
                    .fetch_add(filled.bytes, Ordering::Relaxed);
            }
            filled
        };
        if first != pages {
            self.settle(first.clone(), by, fill)?;
        }
        self.settle(pages.clone(), by, fill)
    }

    /// Fills the missing pages of the range with zeros.
    pub(crate) fn zero(&self, pages: Range<u64>, by: Role) -> Result<(), LazyError> {
        self.settle(pages, by, |address, part| {
            let filled = self.fault.zero(address, part.end - part.start);
            self.counters.add_filled(FillReason::Zeros, filled.bytes);
            filled
        })
    }
}
