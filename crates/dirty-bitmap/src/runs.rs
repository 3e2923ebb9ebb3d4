//! Iteration over runs of marked pages.

use std::iter::FusedIterator;
use std::ops::{ControlFlow, Range};

use crate::bitmap::DirtyBitmap;

/// Runs looked up under one lock: few enough to be cheap to hold, enough that the lock does not show.
const BATCH: usize = 64;

/// The runs of marked pages as byte offsets from the start of the RAM: see [`DirtyBitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a DirtyBitmap,
    /// Where the next batch begins, in bytes, so that it stays right when the granule changes.
    next: u64,
    batch: [(u64, u64); BATCH],
    taken: usize,
    found: usize,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(bitmap: &'a DirtyBitmap) -> Self {
        Self {
            bitmap,
            next: 0,
            batch: [(0, 0); BATCH],
            taken: 0,
            found: 0,
        }
    }

    fn refill(&mut self) {
        self.taken = 0;
        self.found = 0;
        if self.next >= self.bitmap.ram_size() {
            return;
        }
        let moving = self.bitmap.lock();
        let shift = moving.shift();
        let from = self.next >> shift;
        let reported = self.next;
        // Unless the batch fills up first.
        self.next = self.bitmap.ram_size();
        self.bitmap.table(shift).runs(from, |run| {
            let offsets = self.bitmap.offsets_of(run, shift);
            // Made coarser between two batches: the page around was reported up to there.
            self.batch[self.found] = (offsets.start.max(reported), offsets.end);
            self.found += 1;
            if self.found < BATCH {
                return ControlFlow::Continue(());
            }
            self.next = offsets.end;
            ControlFlow::Break(())
        });
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        if self.taken == self.found {
            self.refill();
        }
        let (start, end) = *self.batch[..self.found].get(self.taken)?;
        self.taken += 1;
        Some(start..end)
    }
}

impl FusedIterator for Runs<'_> {}
