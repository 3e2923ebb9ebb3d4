//! Assigns offsets in the file of a sealed or packed image to pages as they are written.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::ops::Range;

use image_format::{Checksums, Placement};
use page_reader::PageReader;
use sparse_file::{RunSource, grow};

/// Bytes by which a packed file grows: direct writes inside its size are faster than those that
/// extend it.
const GROWTH: u64 = 64 << 20;

/// Bytes that are contiguous in RAM and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) guest: u64,
    pub(crate) file: u64,
    pub(crate) len: u64,
}

impl Extent {
    pub(crate) fn guest_range(&self) -> Range<u64> {
        self.guest..self.guest + self.len
    }

    /// Returns the part of the extent inside `range` of guest offsets.
    pub(crate) fn within(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.guest.max(range.start);
        let end = (self.guest + self.len).min(range.end);
        (start < end).then(|| Self {
            guest: start,
            file: self.file + (start - self.guest),
            len: end - start,
        })
    }

    /// Appends `next` if it follows in RAM and in the file. Returns whether it did.
    fn try_append(&mut self, next: &Self) -> bool {
        let follows = self.guest + self.len == next.guest && self.file + self.len == next.file;
        if follows {
            self.len += next.len;
        }
        follows
    }
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    if !extents
        .last_mut()
        .is_some_and(|last| last.try_append(&next))
    {
        extents.push(next);
    }
}

/// The extents of the pages that are in the file.
#[derive(Debug)]
pub(crate) struct ExtentMap {
    placement: Placement,
    /// In ascending order of guest offsets, not overlapping.
    extents: Vec<Extent>,
    /// The offset of the next page in a packed file.
    next: u64,
}

impl ExtentMap {
    /// Creates an empty map. The first page of a packed file is placed at `start`.
    pub(crate) fn new(placement: Placement, start: u64) -> Self {
        Self {
            placement,
            extents: Vec::new(),
            next: start,
        }
    }

    pub(crate) fn placement(&self) -> Placement {
        self.placement
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Returns the parts of the extents that overlap `range`.
    pub(crate) fn within<'m>(&'m self, range: &'m Range<u64>) -> impl Iterator<Item = Extent> + 'm {
        let first = self
            .extents
            .partition_point(|extent| extent.guest_range().end <= range.start);
        self.extents[first..]
            .iter()
            .map_while(move |extent| extent.within(range))
    }

    /// Merges the extents that a pass has added.
    fn merge(&mut self, new: Vec<Extent>, next: u64) {
        self.next = next;
        if self.extents.is_empty() {
            self.extents = new;
            return;
        }
        // Sorts in place: the list of a large guest is large.
        self.extents.extend_from_slice(&new);
        drop(new);
        self.extents.sort_unstable_by_key(|extent| extent.guest);
        self.extents.dedup_by(|next, last| last.try_append(next));
    }
}

/// A write of pages. Assigns an offset to each page, reads the pages in the order of the file, and
/// computes their checksums.
pub(crate) struct WritePass<'p, R: ?Sized> {
    reader: &'p R,
    file: &'p File,
    map: &'p ExtentMap,
    checksums: RefCell<&'p mut Checksums>,
    written: RefCell<Vec<Extent>>,
    /// Extents that were not in the file before. Unused if the map is empty.
    new: RefCell<Vec<Extent>>,
    /// Index of the extent that was read last.
    at: Cell<usize>,
    next: Cell<u64>,
    grown: Cell<u64>,
    /// Maximum number of bytes that the pass writes.
    max_len: u64,
    /// Maximum number of extents that the footer has room for.
    max_extents: usize,
    footer_full: Cell<bool>,
}

impl<'p, R: PageReader + ?Sized> WritePass<'p, R> {
    pub(crate) fn new(
        reader: &'p R,
        file: &'p File,
        map: &'p ExtentMap,
        checksums: &'p mut Checksums,
        max_len: u64,
        max_extents: usize,
    ) -> Self {
        Self {
            reader,
            file,
            map,
            checksums: RefCell::new(checksums),
            written: RefCell::new(Vec::new()),
            new: RefCell::new(Vec::new()),
            at: Cell::new(0),
            next: Cell::new(map.next),
            grown: Cell::new(map.next),
            max_len: map.next.saturating_add(max_len),
            max_extents,
            footer_full: Cell::new(false),
        }
    }

    /// Reserves memory for `runs` runs of RAM, so that the list does not grow beyond its need.
    pub(crate) fn reserve(&self, runs: u64) {
        // If this allocation fails, the list grows as runs are added.
        let runs = usize::try_from(runs).unwrap_or(0);
        let _ = self.written.borrow_mut().try_reserve_exact(runs);
    }

    /// Returns the runs of the file for runs of RAM, in the same order. Ends early if the footer
    /// has no room for more.
    pub(crate) fn file_runs(
        &self,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> impl Iterator<Item = Range<u64>> {
        runs.flat_map(|run| self.split(run)).map_while(|piece| {
            let mut written = self.written.borrow_mut();
            push(&mut written, piece);
            let extents = match self.map.extents.is_empty() {
                true => written.len(),
                false => self.map.extents.len() + self.new.borrow().len(),
            };
            self.footer_full.set(extents > self.max_extents);
            (!self.footer_full.get()).then_some(piece.file..piece.file + piece.len)
        })
    }

    /// Returns whether the footer had no room for more runs.
    pub(crate) fn is_footer_full(&self) -> bool {
        self.footer_full.get()
    }

    /// Splits a run of RAM at the borders of extents that are already in the file.
    fn split(&self, run: Range<u64>) -> Vec<Extent> {
        let mut pieces = Vec::new();
        let mut at = run.start;
        for old in self.map.within(&run) {
            self.place_new(at..old.guest, &mut pieces);
            pieces.push(old);
            at = old.guest_range().end;
        }
        self.place_new(at..run.end, &mut pieces);
        pieces
    }

    fn place_new(&self, range: Range<u64>, pieces: &mut Vec<Extent>) {
        if range.is_empty() {
            return;
        }
        let len = range.end - range.start;
        let file = match self.map.placement {
            Placement::InPlace => range.start,
            Placement::Packed => {
                let file = self.next.get();
                let end = file + len;
                self.next.set(end);
                self.grow(end);
                file
            }
        };
        let extent = Extent {
            guest: range.start,
            file,
            len,
        };
        if !self.map.extents.is_empty() {
            push(&mut self.new.borrow_mut(), extent);
        }
        pieces.push(extent);
    }

    /// Returns the guest offset of the byte at offset `file` of the file.
    pub(crate) fn guest_offset(&self, file: u64) -> u64 {
        let written = self.written.borrow();
        let holds = |extent: &&Extent| (extent.file..extent.file + extent.len).contains(&file);
        let extent = written.iter().find(holds);
        extent.map_or(file, |extent| extent.guest + (file - extent.file))
    }

    fn grow(&self, end: u64) {
        if end > self.grown.get() {
            let len = self.max_len.min(end + GROWTH).max(end);
            // If the file cannot get this size, the write reports the error.
            let _ = grow(self.file, len);
            self.grown.set(len);
        }
    }

    /// Returns the extents to merge into the map once all is written.
    pub(crate) fn finish(self) -> NewExtents {
        let first = self.map.extents.is_empty();
        NewExtents {
            extents: if first { self.written } else { self.new }.into_inner(),
            next: self.next.get(),
        }
    }
}

/// Extents that a pass has added to the file.
pub(crate) struct NewExtents {
    extents: Vec<Extent>,
    next: u64,
}

impl NewExtents {
    pub(crate) fn merge_into(self, map: &mut ExtentMap) {
        map.merge(self.extents, self.next);
    }
}

/// Reads bytes by their offset in the file, in the order of the file's runs.
impl<R: PageReader + ?Sized> RunSource for WritePass<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let written = self.written.borrow();
        let mut checksums = self.checksums.borrow_mut();
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let holds = |extent: &Extent| (extent.file..extent.file + extent.len).contains(&offset);
            let from = self.at.get();
            let at = written[from..].iter().position(holds).map(|at| from + at);
            let at = at.or_else(|| written.iter().position(holds));
            let at = at.ok_or_else(|| io::Error::other("no run contains this offset"))?;
            self.at.set(at);
            let extent = written[at];
            let within = offset - extent.file;
            let len =
                usize::try_from(extent.len - within).map_or(buf.len(), |len| len.min(buf.len()));
            let (now, later) = buf.split_at_mut(len);
            self.reader.read_at(extent.guest + within, now)?;
            // Checksum the copy that is written: the guest may change the page concurrently.
            checksums.feed(extent.guest + within, now);
            (offset, buf) = (offset + len as u64, later);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::in_both(14, 104, 1)]
    #[case::in_ram_only(14, 105, 2)]
    #[case::in_the_file_only(15, 104, 2)]
    fn contiguous_extents_are_joined(
        #[case] guest: u64,
        #[case] file: u64,
        #[case] extents: usize,
    ) {
        let mut all = Vec::new();
        for (guest, file, len) in [(10, 100, 4), (guest, file, 3)] {
            push(&mut all, Extent { guest, file, len });
        }
        assert_eq!(all.len(), extents);
        assert_eq!(all.iter().map(|extent| extent.len).sum::<u64>(), 7);
    }
}
