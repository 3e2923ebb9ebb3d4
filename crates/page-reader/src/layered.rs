//! Sources laid beside and over one another.

use std::io;
use std::ops::Range;

use crate::populated::unknown;
use crate::{HostMemory, PageReader, PopulatedRanges, range};

/// One source made of several: parts one after another, and overlays on top, of which the later wins.
///
/// - A guest whose RAM regions are files of their own (one memfd a region): [`concat`](Self::concat).
/// - A base image with the pages of a diff over it, or a region that only its device holds: [`over`](Self::over), then
///   [`overlay`](Self::overlay).
///
/// Host memory is handed out wherever the layer that's on top has it. All layers are of one type `R`; for sources of
/// different types that is `&dyn PageReader`, or `Box<dyn PageReader + Send + Sync>` to share the whole between
/// threads.
///
/// # Examples
/// ```
/// use page_reader::{FileReader, Layered, PageReader};
/// # use std::io::Write;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let mut image = tempfile::tempfile()?;
/// # image.write_all(&[0; 3 * 4096])?;
/// let base = FileReader::new(image); // 3 pages
/// let page = vec![1; 4096]; // the second one, as it is by now
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
    /// What is on top, from offset 0 to the size: ascending, without gaps, none empty.
    spans: Vec<Span>,
}

/// A range of the whole that one source gives.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    /// Index into `sources`.
    source: usize,
    /// The offset in that source of the byte at `start`.
    source_start: u64,
}

impl Span {
    /// The part of it from `start` to `end`, where there is any.
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

/// Why a source can't be laid there. Offsets and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayeredError {
    /// There is no part.
    #[error("a layered source of no parts: give at least one")]
    NoPart,
    /// A part or overlay has no byte.
    #[error(
        "the part or overlay at offset {offset} is empty: leave it out, or give its size in bytes"
    )]
    Empty {
        /// Where it was to start.
        offset: u64,
    },
    /// An overlay ends past what it lies on.
    #[error(
        "an overlay of {overlay_size} bytes at offset {offset} ends past the {size} bytes it lies on: an overlay covers, \
         it doesn't extend"
    )]
    PastEnd {
        /// Where it was to start.
        offset: u64,
        /// Its size.
        overlay_size: u64,
        /// The size of the whole.
        size: u64,
    },
    /// The parts add up to more than a 64-bit offset can say.
    #[error("the parts add up to 2^64 bytes or more")]
    TooLarge,
}

impl<R> Layered<R> {
    /// The first `size` bytes of `base`, to lay others over.
    ///
    /// Whether `base` has that many shows when they're read.
    ///
    /// # Errors
    /// [`LayeredError::Empty`] for a size of 0.
    pub fn over(base: R, size: u64) -> Result<Self, LayeredError> {
        Self::concat([(base, size)])
    }

    /// Sources one after another: of each, the bytes from its offset 0 up to the size given with it.
    ///
    /// # Errors
    /// No part, one of size 0, or more than 2<sup>64</sup> - 1 bytes in all.
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

    /// Lays the first `size` bytes of `source` over what is there from `offset` on.
    ///
    /// # Errors
    /// A size of 0, or an end past [`size`](Self::size); nothing has changed then.
    pub fn overlay(&mut self, offset: u64, size: u64, source: R) -> Result<(), LayeredError> {
        if size == 0 {
            return Err(LayeredError::Empty { offset });
        }
        let end = match offset.checked_add(size) {
            Some(end) if end <= self.size() => end,
            _ => {
                return Err(LayeredError::PastEnd {
                    offset,
                    overlay_size: size,
                    size: self.size(),
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

    /// The size of the whole in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.end)
    }

    /// The index of the span that holds `offset`, or the number of spans.
    fn first_span(&self, offset: u64) -> usize {
        self.spans.partition_point(|span| span.end <= offset)
    }

    /// The parts of spans, in ascending order, that make up `len` bytes from `offset` on; the range is known to be
    /// inside.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = Span> {
        self.pieces_between(offset, offset + len as u64)
    }

    /// The parts of spans, in ascending order, from `start` to `end`.
    fn pieces_between(&self, start: u64, end: u64) -> impl Iterator<Item = Span> {
        self.spans[self.first_span(start)..]
            .iter()
            .map_while(move |span| span.between(start, end))
    }

    /// What `ask` finds in each source, of the range given with it.
    pub(crate) fn populated_by<'a>(
        &'a self,
        range: Range<u64>,
        ask: impl Fn(&'a R, Range<u64>) -> PopulatedRanges<'a> + 'a,
    ) -> PopulatedRanges<'a> {
        let pieces = self.pieces_between(range.start, range.end);
        let inside = pieces.flat_map(move |piece| {
            let first = piece.source_start;
            let asked = first..first + (piece.end - piece.start);
            let found = ask(&self.sources[piece.source], asked);
            let offset_of = move |at: u64| piece.start + (at - first);
            found.map(move |found| offset_of(found.start)..offset_of(found.end))
        });
        Box::new(inside.chain(unknown(range.start.max(self.size())..range.end)))
    }
}

impl<R: PageReader> PageReader for Layered<R> {
    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        range::check(offset, buf.len(), self.size())?;
        for piece in self.pieces(offset, buf.len()) {
            // No longer than buf, so it fits in usize.
            let (now, later) = buf.split_at_mut((piece.end - piece.start) as usize);
            self.sources[piece.source].read_at(piece.source_start, now)?;
            buf = later;
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = range::available(offset, len, self.size())?;
        let piece = self.pieces(offset, len).next()?;
        let len = (piece.end - piece.start) as usize;
        self.sources[piece.source].host_memory(piece.source_start, len)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.populated_by(range, R::populated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all_of<R: PageReader>(source: &Layered<R>) -> Vec<u8> {
        let mut all = vec![0; source.size() as usize];
        source.read_at(0, &mut all).unwrap();
        all
    }

    #[test]
    fn parts_stand_one_after_another() {
        let parts: [(&[u8], u64); 3] = [(b"one", 3), (b"two more", 3), (b"!", 1)];
        assert_eq!(all_of(&Layered::concat(parts).unwrap()), b"onetwo!");
    }

    #[test]
    fn the_later_overlay_wins_and_what_it_does_not_cover_stays() {
        let mut guest = Layered::<&[u8]>::over(b"..........", 10).unwrap();
        guest.overlay(2, 6, b"aaaaaa").unwrap();
        guest.overlay(4, 2, b"bb").unwrap();
        assert_eq!(all_of(&guest), b"..aabbaa..");
        guest.overlay(0, 10, b"0123456789").unwrap();
        assert_eq!(all_of(&guest), b"0123456789");
        assert_eq!(guest.spans.len(), 1, "what is wholly covered is forgotten");
    }

    #[test]
    fn host_memory_is_handed_out_where_the_top_layer_has_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let base = crate::FileReader::new(file);
        let page = b"page".to_vec();
        let mut guest = Layered::<&dyn PageReader>::over(&base, 10).unwrap();
        guest.overlay(3, 4, &page).unwrap();
        assert!(guest.host_memory(2, 100).is_none());
        let memory = guest.host_memory(4, 100).unwrap();
        assert_eq!((memory.as_ptr(), memory.len()), (&raw const page[1], 3));
    }

    #[test]
    fn a_part_that_is_shorter_than_said_is_an_unexpected_end() {
        let parts: [(&[u8], u64); 2] = [(b"short", 6), (b"next", 4)];
        let guest = Layered::concat(parts).unwrap();
        let error = guest.read_at(3, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn layers_that_make_no_sense_are_refused_and_change_nothing() {
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
        fn any_overlays_read_as_if_each_had_been_written_over_the_base(
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
