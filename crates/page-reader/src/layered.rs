//! Sources that are adjacent or overlaid.

use std::io;
use std::ops::Range;

use host_memory::{HostMemory, available_len, check_range};

use crate::populated::{PopulatedRanges, unknown};
use crate::reader::PageReader;

/// A source composed of others: adjacent parts, and overlays that replace ranges of them.
///
/// - RAM regions in separate files, such as one memfd for each region: [`concat`](Self::concat).
/// - A base image with the pages of a diff over it, or with a region that only its device has:
///   [`over`](Self::over), then [`overlay`](Self::overlay).
///
/// A later overlay replaces an earlier one. Host memory is returned where the topmost layer has it.
/// All layers have the same type `R`. For sources of different types, use `&dyn PageReader`, or
/// `Box<dyn PageReader + Send + Sync>` to share the result between threads.
///
/// # Examples
/// ```
/// use page_reader::{FileReader, Layered, PageReader};
/// # use std::io::Write;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut image = tempfile::tempfile()?;
/// # image.write_all(&[0; 3 * 4096])?;
/// let base = FileReader::new(image); // 3 pages
/// let page = vec![1; 4096]; // the new content of the second page
///
/// let mut guest = Layered::<&dyn PageReader>::over(&base, 3 * 4096)?;
/// guest.overlay(4096, 4096, &page)?;
///
/// let mut border = [9; 2];
/// guest.read_at(4095, &mut border)?;
/// assert_eq!(border, [0, 1]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Layered<R> {
    sources: Vec<R>,
    /// The topmost layers from offset 0 to the size: ascending, without gaps, none empty.
    spans: Vec<Span>,
}

/// A range of the result that a single source provides.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    /// Index into `sources`.
    source: usize,
    /// The offset in the source of the byte at `start`.
    source_start: u64,
}

impl Span {
    /// Returns the part of the span from `start` to `end`, or `None` if it is empty.
    fn between(self, start: u64, end: u64) -> Option<Self> {
        let (start, end) = (self.start.max(start), self.end.min(end));
        (start < end).then(|| Self {
            start,
            end,
            source_start: self.source_start + (start - self.start),
            ..self
        })
    }
}

/// An error in the arrangement of layers. Offsets and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayeredError {
    /// No part was given.
    #[error("a layered source has no parts: give at least one")]
    NoPart,
    /// A part or overlay is empty.
    #[error(
        "the part or overlay at offset {offset:#x} is empty: leave it out, or give its size in bytes"
    )]
    Empty {
        /// The offset of its start.
        offset: u64,
    },
    /// An overlay ends past the layers below it.
    #[error(
        "an overlay of length {overlay_size} at offset {offset:#x} ends past the {size} bytes below \
         it: shorten it or extend the base"
    )]
    PastEnd {
        /// The offset of its start.
        offset: u64,
        /// Its size.
        overlay_size: u64,
        /// The size of the layers below.
        size: u64,
    },
    /// The sizes of the parts add up to 2<sup>64</sup> bytes or more.
    #[error("the parts add up to 2^64 bytes or more: give fewer or smaller parts")]
    TooLarge,
}

impl<R> Layered<R> {
    /// Returns the first `size` bytes of `base`, ready for overlays.
    ///
    /// The actual size of `base` is not checked: reading bytes that it lacks fails.
    ///
    /// # Errors
    /// Returns [`LayeredError::Empty`] for a size of 0.
    pub fn over(base: R, size: u64) -> Result<Self, LayeredError> {
        Self::concat([(base, size)])
    }

    /// Returns the given sources one after another. Each is used from its offset 0 up to the size
    /// given with it.
    ///
    /// # Errors
    /// Returns an error if there is no part, if a part has size 0, or if the sizes add up to more
    /// than 2<sup>64</sup> - 1 bytes.
    pub fn concat(parts: impl IntoIterator<Item = (R, u64)>) -> Result<Self, LayeredError> {
        let (mut sources, mut spans) = (Vec::new(), Vec::new());
        let mut start = 0_u64;
        for (source, size) in parts {
            if size == 0 {
                return Err(LayeredError::Empty { offset: start });
            }
            let end = start.checked_add(size).ok_or(LayeredError::TooLarge)?;
            spans.push(Span {
                start,
                end,
                source: sources.len(),
                source_start: 0,
            });
            sources.push(source);
            start = end;
        }
        if sources.is_empty() {
            return Err(LayeredError::NoPart);
        }
        Ok(Self { sources, spans })
    }

    /// Places the first `size` bytes of `source` over the layers at `offset`.
    ///
    /// # Errors
    /// Returns an error, and changes nothing, if the size is 0 or the end is past
    /// [`ram_size`](Self::ram_size).
    pub fn overlay(&mut self, offset: u64, size: u64, source: R) -> Result<(), LayeredError> {
        if size == 0 {
            return Err(LayeredError::Empty { offset });
        }
        let end = match offset.checked_add(size) {
            Some(end) if end <= self.ram_size() => end,
            _ => {
                return Err(LayeredError::PastEnd {
                    offset,
                    overlay_size: size,
                    size: self.ram_size(),
                });
            }
        };
        let first = self.first_span(offset);
        let after = self.spans.partition_point(|span| span.start < end);
        let left = self.spans[first].between(0, offset);
        let right = self.spans[after - 1].between(end, u64::MAX);
        let top = Span {
            start: offset,
            end,
            source: self.sources.len(),
            source_start: 0,
        };
        self.spans
            .splice(first..after, left.into_iter().chain([top]).chain(right));
        self.sources.push(source);
        Ok(())
    }

    /// Returns the size of all layers together, in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.end)
    }

    /// Returns the index of the span at `offset`, or the number of spans if there is none.
    fn first_span(&self, offset: u64) -> usize {
        self.spans.partition_point(|span| span.end <= offset)
    }

    /// Returns the parts of spans within `len` bytes at `offset`, ascending. The range must be
    /// within the size.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Span> {
        self.pieces_between(offset, offset + len as u64)
    }

    /// Returns the parts of spans from `start` to `end`, ascending.
    fn pieces_between(&self, start: u64, end: u64) -> impl Iterator<Item = Span> {
        self.spans[self.first_span(start)..]
            .iter()
            .map_while(move |span| span.between(start, end))
    }

    /// Returns the ranges that `query` finds in each source, as offsets in the result. `query`
    /// receives a source and a range of its offsets.
    ///
    /// Use it in a reader that wraps this one and knows more than its sources, as in
    /// [`populated`](PageReader::populated). The part of `range` past the end is returned too.
    ///
    /// # Examples
    /// ```
    /// use page_reader::Layered;
    ///
    /// let guest = Layered::concat([(vec![0; 4096], 4096), (vec![1; 4096], 4096)])?;
    /// let mut nonzero = guest.populated_by(0..8192, |bytes, range| {
    ///     let is_zero = bytes.iter().all(|byte| *byte == 0);
    ///     Box::new(Some(range).filter(|_| !is_zero).into_iter())
    /// });
    /// assert_eq!(nonzero.next(), Some(4096..8192));
    /// assert_eq!(nonzero.next(), None);
    /// # Ok::<(), page_reader::LayeredError>(())
    /// ```
    pub fn populated_by<'a>(
        &'a self,
        range: Range<u64>,
        query: impl Fn(&'a R, Range<u64>) -> PopulatedRanges<'a> + 'a,
    ) -> PopulatedRanges<'a> {
        let pieces = self.pieces_between(range.start, range.end);
        let inside = pieces.flat_map(move |piece| {
            let first = piece.source_start;
            let queried = first..first + (piece.end - piece.start);
            let found = query(&self.sources[piece.source], queried);
            let offset_of = move |at: u64| piece.start + (at - first);
            found.map(move |found| offset_of(found.start)..offset_of(found.end))
        });
        Box::new(inside.chain(unknown(range.start.max(self.ram_size())..range.end)))
    }
}

impl<R: PageReader> PageReader for Layered<R> {
    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.ram_size())?;
        for piece in self.pieces(offset, buf.len()) {
            // At most the length of buf, so it fits in usize.
            let (now, later) = buf.split_at_mut((piece.end - piece.start) as usize);
            self.sources[piece.source].read_at(piece.source_start, now)?;
            buf = later;
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = available_len(offset, len, self.ram_size())?;
        let piece = self.pieces(offset, len).next()?;
        let len = (piece.end - piece.start) as usize;
        self.sources[piece.source].host_memory(piece.source_start, len)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.populated_by(range, R::populated)
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.ram_size())
    }

    fn check_source(&self) -> io::Result<()> {
        self.sources.iter().try_for_each(R::check_source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all_of<R: PageReader>(source: &Layered<R>) -> Vec<u8> {
        let mut all = vec![0; source.ram_size() as usize];
        source.read_at(0, &mut all).unwrap();
        all
    }

    #[test]
    fn parts_are_read_one_after_another() {
        let parts: [(&[u8], u64); 3] = [(b"one", 3), (b"two more", 3), (b"!", 1)];
        assert_eq!(all_of(&Layered::concat(parts).unwrap()), b"onetwo!");
    }

    #[test]
    fn a_later_overlay_replaces_what_it_covers_only() {
        let mut guest = Layered::<&[u8]>::over(b"..........", 10).unwrap();
        guest.overlay(2, 6, b"aaaaaa").unwrap();
        guest.overlay(4, 2, b"bb").unwrap();
        assert_eq!(all_of(&guest), b"..aabbaa..");
        guest.overlay(0, 10, b"0123456789").unwrap();
        assert_eq!(all_of(&guest), b"0123456789");
        assert_eq!(guest.spans.len(), 1, "covered layers are removed");
    }

    #[test]
    fn host_memory_is_that_of_the_topmost_layer() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let base = crate::file::FileReader::new(file);
        let page = b"page".to_vec();
        let mut guest = Layered::<&dyn PageReader>::over(&base, 10).unwrap();
        guest.overlay(3, 4, &page).unwrap();
        assert!(guest.host_memory(2, 100).is_none());
        let memory = guest.host_memory(4, 100).unwrap();
        assert_eq!((memory.as_ptr(), memory.len()), (&raw const page[1], 3));
    }

    #[test]
    fn a_part_shorter_than_its_size_is_unexpected_eof() {
        let parts: [(&[u8], u64); 2] = [(b"short", 6), (b"next", 4)];
        let guest = Layered::concat(parts).unwrap();
        let error = guest.read_at(3, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn invalid_layers_are_refused_and_change_nothing() {
        use LayeredError::{Empty, NoPart, PastEnd, TooLarge};
        let none: [(&[u8], u64); 0] = [];
        assert_eq!(Layered::concat(none).unwrap_err(), NoPart);
        assert_eq!(
            Layered::concat([([0], 1), ([0], 0)]).unwrap_err(),
            Empty { offset: 1 }
        );
        assert_eq!(
            Layered::concat([([0], u64::MAX), ([0], 1)]).unwrap_err(),
            TooLarge
        );
        let mut guest = Layered::over(*b"guest", 5).unwrap();
        assert_eq!(
            guest.overlay(1, 0, *b"*****").unwrap_err(),
            Empty { offset: 1 }
        );
        for (offset, overlay_size) in [(5, 1), (1, 5), (6, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(
                guest.overlay(offset, overlay_size, *b"*****").unwrap_err(),
                PastEnd {
                    offset,
                    overlay_size,
                    size: 5
                }
            );
        }
        assert_eq!(all_of(&guest), b"guest");
    }

    proptest! {
        #[test]
        fn overlays_read_like_writes_over_the_base(
            overlays in prop::collection::vec((0..60_usize, 1..20_usize, any::<u8>()), 0..12),
            read in (0..60_usize, 0..60_usize),
        ) {
            const SIZE: usize = 60;
            let base: Vec<u8> = (0..SIZE as u8).collect();
            let mut oracle = base.clone();
            let mut guest = Layered::over(base, SIZE as u64).unwrap();
            for (offset, len, seed) in overlays {
                let len = len.min(SIZE - offset);
                let bytes: Vec<u8> = (0..len as u8).map(|i| seed.wrapping_add(i)).collect();
                oracle[offset..offset + len].copy_from_slice(&bytes);
                guest.overlay(offset as u64, len as u64, bytes).unwrap();
            }
            let (offset, len) = (read.0, read.1.min(SIZE - read.0));
            let mut buf = vec![0; len];
            guest.read_at(offset as u64, &mut buf).unwrap();
            prop_assert_eq!(buf, &oracle[offset..offset + len]);
        }
    }
}
