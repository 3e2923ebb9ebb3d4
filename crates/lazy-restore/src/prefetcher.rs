//! The prefetcher: fills the pages of a working set, and then all other pages.

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, OnceLock};

use crate::error::LazyError;
use crate::ledger::Role;
use crate::page_buffer::PageBuffer;
use crate::pages::Pages;
use crate::read_ahead::ReadAhead;
use crate::working_set::WorkingSet;

/// Bytes that are read at a time.
const READ_SIZE: u64 = 1 << 20;
/// Runs of a working set for which read-ahead is requested at once. The runs are small, and a disk
/// is fast only with many requests in flight.
const RUNS_AHEAD: usize = 256;

/// Why the prefetcher did not try to fill all pages.
enum Ended {
    Cancelled,
    Failed(LazyError),
}

impl From<LazyError> for Ended {
    fn from(error: LazyError) -> Self {
        Self::Failed(error)
    }
}

/// A function that is called after each piece, and may cancel.
type Report<'r> = &'r mut dyn FnMut() -> ControlFlow<()>;

/// Fills pages in the background.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    pages: Arc<Pages>,
    working_set: Option<WorkingSet>,
    /// Bytes that the source stores, counted on first use.
    stored_bytes: OnceLock<u64>,
}

impl Prefetcher {
    /// Returns a prefetcher that fills the pages of `working_set` first.
    pub(crate) fn new(pages: Arc<Pages>, working_set: Option<WorkingSet>) -> Self {
        Self {
            pages,
            working_set,
            stored_bytes: OnceLock::new(),
        }
    }

    /// Returns the number of bytes that the images store, in whole pages.
    pub(crate) fn stored_bytes(&self) -> u64 {
        *self.stored_bytes.get_or_init(|| {
            let runs = self.pages.stored(0..self.pages.memory_size());
            runs.map(|run| run.end - run.start).sum()
        })
    }

    /// Fills all pages. Returns [`ControlFlow::Break`] if `report` cancelled that.
    pub(crate) fn run(&self, report: Report<'_>) -> ControlFlow<()> {
        let filled = self
            .fill_working_set(report)
            .and_then(|()| self.fill_stored(report));
        match filled.and_then(|()| self.check_images().map_err(Ended::Failed)) {
            Err(Ended::Cancelled) => {
                self.pages.status().cancel_prefetch();
                return ControlFlow::Break(());
            }
            Err(Ended::Failed(error)) => self.pages.prefetch_failed(error),
            // Pages that are missing now are zeros in the images, and become zeros on access.
            Ok(()) if !self.is_stopped() => self.pages.finish(),
            Ok(()) => {}
        }
        self.pages.status().end_prefetch();
        ControlFlow::Continue(())
    }

    /// Fails if bytes that were filled may be of several states of an image.
    fn check_images(&self) -> Result<(), LazyError> {
        match self.is_stopped() {
            true => Ok(()),
            false => self
                .pages
                .source()
                .check_source()
                .map_err(LazyError::of_source),
        }
    }

    fn is_stopped(&self) -> bool {
        self.pages.status().is_stopped()
    }

    /// Fills the pages of the working set. Pages of it that the images do not store are filled with
    /// zeros, up to the number of bytes that the images store. The limit exists because a page of
    /// zeros takes an entry in the page table, and the working set may contain all of the RAM that
    /// an image merely claims. The other pages become zeros on access.
    fn fill_working_set(&self, report: Report<'_>) -> Result<(), Ended> {
        let Some(working_set) = &self.working_set else {
            return Ok(());
        };
        let page_size = self.pages.page_size();
        let mut zeros_left = self.stored_bytes();
        let mut buffer = PageBuffer::new();
        let (mut advised, mut ahead) = (0, working_set.runs());
        for (index, run) in working_set.runs().enumerate() {
            if self.is_stopped() {
                break;
            }
            if index == advised {
                let next = ahead.by_ref().take(RUNS_AHEAD);
                next.for_each(|run| self.pages.source().read_ahead(run));
                advised += RUNS_AHEAD;
            }
            let start = run.start - run.start % page_size;
            let end = run.end.next_multiple_of(page_size);
            let mut at = start;
            let no_more = end..end;
            for stored in self.pages.stored(start..end).chain([no_more]) {
                check_ascending(at, &stored)?;
                let gap = at..stored.start.min(at.saturating_add(zeros_left));
                zeros_left -= gap.end - gap.start;
                self.in_pieces(gap, report, |piece| {
                    self.pages.zero(piece, Role::WorkingSet)
                })?;
                at = stored.end;
                self.in_pieces(stored, report, |piece| {
                    self.pages.prefetch(piece, &mut buffer, Role::WorkingSet)
                })?;
            }
        }
        Ok(())
    }

    fn fill_stored(&self, report: Report<'_>) -> Result<(), Ended> {
        let mut buffer = PageBuffer::new();
        let mut ahead = ReadAhead::new(READ_SIZE);
        let mut advised = 0;
        let mut at = 0;
        let stored = self.pages.stored(0..self.pages.memory_size());
        for run in stored.take_while(|_| !self.is_stopped()) {
            check_ascending(at, &run)?;
            at = run.end;
            self.in_pieces(run, report, |piece| {
                advised = piece.start.max(advised);
                let distance = ahead.next(self.pages.counters().faults());
                while advised < self.pages.clip(piece.end + distance) {
                    self.pages.source().read_ahead(advised..advised + READ_SIZE);
                    advised += READ_SIZE;
                }
                self.pages.prefetch(piece, &mut buffer, Role::Prefetcher)
            })?;
        }
        Ok(())
    }

    /// Calls `each` for the pieces of a run, and `report` after each, until an error, or until
    /// stopped or cancelled.
    fn in_pieces(
        &self,
        run: Range<u64>,
        report: Report<'_>,
        mut each: impl FnMut(Range<u64>) -> Result<(), LazyError>,
    ) -> Result<(), Ended> {
        let size = READ_SIZE.max(self.pages.page_size());
        let starts = run.clone().step_by(size as usize);
        for start in starts.take_while(|_| !self.is_stopped()) {
            each(start..run.end.min(start + size))?;
            if report().is_break() {
                return Err(Ended::Cancelled);
            }
        }
        Ok(())
    }
}

/// Fails if the source has returned a run before one that it returned earlier: the pages between
/// were taken for zeros.
fn check_ascending(end: u64, next: &Range<u64>) -> Result<(), LazyError> {
    if end <= next.start {
        return Ok(());
    }
    let start = next.start;
    Err(LazyError::Source(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("its `populated` returned {start:#x} after {end:#x}, and ranges must ascend"),
    )))
}
