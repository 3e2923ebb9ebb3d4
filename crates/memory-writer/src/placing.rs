//! Where pages stand in the file of a sealed or packed image, decided as they are written.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::ops::Range;

use image_format::{Checksums, Placement};
use page_reader::PageReader;
use sparse_file::{Source, grow};

/// A packed file grows by so many bytes at a time: direct writes within its size are faster than those that extend it.
const GROWTH: u64 = 64 << 20;

/// Bytes that follow each other in RAM and in the file.
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

    /// What of it lies in `range` (guest offsets).
    pub(crate) fn within(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.guest.max(range.start);
        let end = (self.guest + self.len).min(range.end);
        (start < end).then(|| Self {
            guest: start,
            file: self.file + (start - self.guest),
            len: end - start,
        })
    }

    /// Takes up `next` where it follows, in RAM and in the file.
    fn join(&mut self, next: &Self) -> bool {
        let follows = self.guest + self.len == next.guest && self.file + self.len == next.file;
        if follows {
            self.len += next.len;
        }
        follows
    }
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    if !extents.last_mut().is_some_and(|last| last.join(&next)) {
        extents.push(next);
    }
}

/// The pages that are in the file.
#[derive(Debug)]
pub(crate) struct Map {
    placement: Placement,
    /// Ascending by guest offset, not overlapping.
    extents: Vec<Extent>,
    /// Where the next page goes in a packed file.
    next: u64,
}

impl Map {
    /// Of no pages, the first of which goes to the offset `start` of a packed file.
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

    /// The extents that reach into `range`, cut to it.
    pub(crate) fn within<'m>(&'m self, range: &'m Range<u64>) -> impl Iterator<Item = Extent> + 'm {
        let first = self
            .extents
            .partition_point(|extent| extent.guest_range().end <= range.start);
        self.extents[first..]
            .iter()
            .map_while(move |extent| extent.within(range))
    }

    /// Takes up the pages that a pass has written and that were not there: they come between the others.
    fn take_up(&mut self, new: Vec<Extent>, next: u64) {
        self.next = next;
        if self.extents.is_empty() {
            self.extents = new;
            return;
        }
        // In place: of a large guest the list is large.
        self.extents.extend_from_slice(&new);
        drop(new);
        self.extents.sort_unstable_by_key(|extent| extent.guest);
        self.extents.dedup_by(|next, last| last.join(next));
    }
}

/// One write of pages: decides where each goes, gathers their bytes in the order of the file, and sums them as they pass by.
pub(crate) struct Pass<'p, R: ?Sized> {
    reader: &'p R,
    file: &'p File,
    map: &'p Map,
    checksums: RefCell<&'p mut Checksums>,
    written: RefCell<Vec<Extent>>,
    /// What of it was not in the file before; not kept if nothing was.
    new: RefCell<Vec<Extent>>,
    /// Index of the extent whose bytes are asked for.
    at: Cell<usize>,
    next: Cell<u64>,
    grown: Cell<u64>,
    /// No more bytes than this are written by the pass.
    most: u64,
    /// No more extents than this fit into a footer.
    most_extents: usize,
    full_up: Cell<bool>,
}

impl<'p, R: PageReader + ?Sized> Pass<'p, R> {
    pub(crate) fn new(
        reader: &'p R,
        file: &'p File,
        map: &'p Map,
        checksums: &'p mut Checksums,
        most: u64,
        most_extents: usize,
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
            most: map.next.saturating_add(most),
            most_extents,
            full_up: Cell::new(false),
        }
    }

    /// So many runs of RAM are coming: a list that need not grow has room for no more.
    pub(crate) fn expect(&self, runs: u64) {
        // Where there is no memory for all of them, it grows as they come.
        let runs = usize::try_from(runs).unwrap_or(0);
        let _ = self.written.borrow_mut().try_reserve_exact(runs);
    }

    /// The runs of the file that take these runs of RAM, in their order. Ends early where the footer would have no room for more.
    pub(crate) fn file_runs(
        &self,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> impl Iterator<Item = Range<u64>> {
        runs.flat_map(|run| self.pieces(run)).map_while(|piece| {
            let mut written = self.written.borrow_mut();
            push(&mut written, piece);
            let extents = match self.map.extents.is_empty() {
                true => written.len(),
                false => self.map.extents.len() + self.new.borrow().len(),
            };
            self.full_up.set(extents > self.most_extents);
            (!self.full_up.get()).then_some(piece.file..piece.file + piece.len)
        })
    }

    /// Whether the footer had no room for more.
    pub(crate) fn is_full_up(&self) -> bool {
        self.full_up.get()
    }

    /// A run of RAM, cut where pages that are in the file already begin and end.
    fn pieces(&self, run: Range<u64>) -> Vec<Extent> {
        let mut pieces = Vec::new();
        let mut at = run.start;
        for old in self.map.within(&run) {
            self.new_piece(at..old.guest, &mut pieces);
            pieces.push(old);
            at = old.guest_range().end;
        }
        self.new_piece(at..run.end, &mut pieces);
        pieces
    }

    fn new_piece(&self, range: Range<u64>, pieces: &mut Vec<Extent>) {
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

    /// The guest offset of the byte that is asked for at this offset of the file.
    pub(crate) fn guest_offset(&self, file: u64) -> u64 {
        let written = self.written.borrow();
        let holds = |extent: &&Extent| (extent.file..extent.file + extent.len).contains(&file);
        let extent = written.iter().find(holds);
        extent.map_or(file, |extent| extent.guest + (file - extent.file))
    }

    fn grow(&self, end: u64) {
        if end > self.grown.get() {
            let len = self.most.min(end + GROWTH).max(end);
            // A file that can't be so large says so when it is written.
            let _ = grow(self.file, len);
            self.grown.set(len);
        }
    }

    /// What the map is to take up, now that all is written.
    pub(crate) fn finish(self) -> Placed {
        let first = self.map.extents.is_empty();
        Placed {
            extents: if first { self.written } else { self.new }.into_inner(),
            next: self.next.get(),
        }
    }
}

/// Pages that a pass has put into the file, and that were not there.
pub(crate) struct Placed {
    extents: Vec<Extent>,
    next: u64,
}

impl Placed {
    pub(crate) fn into_map(self, map: &mut Map) {
        map.take_up(self.extents, self.next);
    }
}

/// Bytes by their offset in the file, asked for in the order of its runs.
impl<R: PageReader + ?Sized> Source for Pass<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let written = self.written.borrow();
        let mut checksums = self.checksums.borrow_mut();
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let holds = |extent: &Extent| (extent.file..extent.file + extent.len).contains(&offset);
            let from = self.at.get();
            let at = written[from..].iter().position(holds).map(|at| from + at);
            let at = at.or_else(|| written.iter().position(holds));
            let at = at.ok_or_else(|| io::Error::other("no run has this offset"))?;
            self.at.set(at);
            let extent = written[at];
            let within = offset - extent.file;
            let len =
                usize::try_from(extent.len - within).map_or(buf.len(), |len| len.min(buf.len()));
            let (now, later) = buf.split_at_mut(len);
            self.reader.read_at(extent.guest + within, now)?;
            // Of the copy that is written, whatever the guest does meanwhile.
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
    #[case::in_ram_alone(14, 105, 2)]
    #[case::in_the_file_alone(15, 104, 2)]
    fn what_follows_in_ram_and_in_the_file_is_one_extent(
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
