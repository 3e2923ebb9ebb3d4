//! An iterator over the runs of marked pages.

use std::fmt;
use std::iter::FusedIterator;
use std::ops::Range;

use crate::edges::Edges;
use crate::marks::Marks;

/// An iterator over the runs of marked pages, as byte offsets from the start of the RAM.
///
/// Created by [`DirtyBitmap::runs`](crate::DirtyBitmap::runs).
#[must_use = "iterators do nothing until they are consumed"]
pub struct Runs<'a> {
    marks: &'a Marks,
    /// The start of the next batch, in bytes: it stays valid when the granule changes.
    next: u64,
    /// The edges found under one lock, in bytes.
    batch: Edges,
    taken: usize,
}

impl<'a> Runs<'a> {
    pub(crate) fn new(marks: &'a Marks) -> Self {
        Self {
            marks,
            next: 0,
            batch: Edges::new(),
            taken: 0,
        }
    }

    #[inline(never)]
    fn refill(&mut self) {
        let ram_size = self.marks.ram.size;
        if self.next >= ram_size {
            return;
        }
        self.taken = 0;
        let open = self.batch.retain_open_run();
        let generation = self.marks.lock();
        let shift = generation.shift();
        let table = self.marks.table(shift);
        let rest = table.edges(self.next >> shift, open, &mut self.batch);
        drop(generation);

        let new = &mut self.batch.as_mut_slice()[usize::from(open)..];
        new.iter_mut().for_each(|edge| *edge <<= shift);
        // If the bitmap became coarser between two batches, the first page begins before `next`,
        // and that part was returned already.
        if let Some(first) = new.first_mut() {
            *first = self.next.max(*first);
        }
        if let Some(last) = new.last_mut() {
            *last = ram_size.min(*last);
        }
        self.next = rest.map_or(ram_size, |page| page << shift);
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        // The start of a run without its end is not a run yet.
        if self.taken + 1 >= self.batch.as_slice().len() {
            self.refill();
        }
        let [start, end] = *self.batch.as_slice().get(self.taken..)?.first_chunk()?;
        self.taken += 2;
        Some(start..end)
    }
}

impl FusedIterator for Runs<'_> {}

impl fmt::Debug for Runs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runs")
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}
