//! Decides which parts of a chain are mapped, and which are copied.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::ops::Range;

use super::Region;
use super::data::FileData;
use crate::chain::Chain;
use crate::chain::segment::{Segment, SegmentSource};
use crate::error::{MapError, ReadImageError};

/// Segments of one layer that one mapping covers, because their distances in the RAM and in the
/// file are the same. The gaps between them are pages of newer layers, which are put over the
/// mapping, and, in a base that is not packed, zeros that the file has in the same places.
///
/// In a diff, the whole span is data of the file: copying a page over a mapping first reads the
/// file's page under it.
///
/// Ordered by the number of bytes that mapping it saves from being copied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    own: u64,
    layer: usize,
    start: u64,
    end: u64,
    /// Offset of `start` in the layer's file.
    offset: u64,
}

impl Span {
    /// Returns the part in whole pages of the host. Empty if RAM and file offset are not congruent
    /// modulo the page size.
    fn whole_pages(&self, page: u64) -> Range<u64> {
        let start = self.start.next_multiple_of(page);
        let end = self.end - self.end % page;
        let aligned = self.start % page == self.offset % page;
        start..if aligned { end.max(start) } else { start }
    }
}

/// Bytes of a layer's file that no mapping covers.
pub(super) struct Copy {
    pub(super) layer: usize,
    pub(super) offset: u64,
    pub(super) range: Range<u64>,
}

/// The mappings to make, the oldest layer first.
pub(super) struct Plan {
    spans: Vec<Span>,
    data: FileData,
}

impl Plan {
    pub(super) fn new(
        chain: &Chain,
        page: u64,
        max_mappings: usize,
    ) -> Result<Self, ReadImageError> {
        // Each mapping may split another one.
        let most = max_mappings.saturating_sub(1) / 2;
        if most == 0 {
            return Ok(Self {
                spans: Vec::new(),
                data: FileData::all(chain),
            });
        }
        let data = FileData::list(chain)?;
        let mut longest = BinaryHeap::new();
        each_span(chain, &data, |span| {
            if !span.whole_pages(page).is_empty() {
                longest.push(Reverse(span));
                if longest.len() > most {
                    longest.pop();
                }
            }
        });
        let mut spans: Vec<_> = longest.into_iter().map(|Reverse(span)| span).collect();
        spans.sort_unstable_by_key(|span| (span.layer, span.start));
        Ok(Self { spans, data })
    }

    pub(super) fn map_over(
        &self,
        mut ram: Region,
        chain: &Chain,
        page: u64,
    ) -> Result<Region, MapError> {
        for span in &self.spans {
            let image = chain.image(span.layer);
            let failed = |source| MapError::Map {
                path: image.path.clone(),
                source,
            };
            let range = span.whole_pages(page);
            let offset = span.offset + (range.start - span.start);
            let file = image.file()?;
            let file_size = file.metadata().map_err(failed)?.len();
            if file_size < offset + len(&range) {
                let truncated = "the file was truncated since it was opened";
                return Err(failed(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    truncated,
                )));
            }
            let mapped = ram.map_over(range, &file, offset);
            ram = mapped.map_err(|source| match source.kind() {
                // The address space is reserved and uses no memory, so this error means that the
                // limit of mappings is reached.
                io::ErrorKind::OutOfMemory => MapError::TooManyMappings {
                    path: image.path.clone(),
                    source,
                },
                _ => failed(source),
            })?;
        }
        Ok(ram)
    }

    /// Returns the number of bytes that the images store, and the parts of them that no mapping
    /// covers.
    pub(super) fn copies(&self, chain: &Chain, page: u64) -> (u64, Vec<Copy>) {
        let (mut stored, mut copies) = (0, Vec::new());
        for (Segment { range, source }, _) in self.data.segments(chain) {
            let SegmentSource::Stored { layer, offset } = source else {
                continue;
            };
            stored += len(&range);
            let covered = self.covered(layer, &range, page);
            let parts = [range.start..covered.start, covered.end..range.end];
            let parts = parts.into_iter().filter(|part| !part.is_empty());
            copies.extend(parts.map(|part| Copy {
                layer,
                offset: offset + (part.start - range.start),
                range: part,
            }));
        }
        (stored, copies)
    }

    /// Returns the part of a layer's segment that a mapping covers: all, all but its ends, or an
    /// empty range at its start.
    fn covered(&self, layer: usize, segment: &Range<u64>, page: u64) -> Range<u64> {
        let Range { start, end } = *segment;
        let after = self
            .spans
            .partition_point(|span| (span.layer, span.start) <= (layer, start));
        let span = self.spans[..after].last();
        let span = span.filter(|span| span.layer == layer && end <= span.end);
        let covered = span.map_or(start..start, |span| span.whole_pages(page));
        covered.start.clamp(start, end)..covered.end.clamp(start, end)
    }
}

/// Calls `each` for every span of the chain, each as long as possible.
fn each_span(chain: &Chain, data: &FileData, mut each: impl FnMut(Span)) {
    // Pages that are adjacent in the RAM may have other pages between them in a packed file.
    let zeros_are_in_the_base = chain.base().in_place();
    // Ascending by layer. A span ends where an older layer has the bytes.
    let mut open: Vec<Span> = Vec::new();
    for (Segment { range, source }, is_data) in data.segments(chain) {
        let continuing = match source {
            SegmentSource::Stored { layer, .. } => layer + 1,
            SegmentSource::Hole if zeros_are_in_the_base => 1,
            // No older layer is mapped beneath zeros that its file does not have.
            SegmentSource::Hole | SegmentSource::Zero => 0,
        };
        while let Some(span) = open.pop_if(|span| span.layer >= continuing) {
            each(span);
        }
        let SegmentSource::Stored { layer, offset } = source else {
            continue;
        };
        if !is_data {
            continue;
        }
        let same_layer = |span: &mut Span| span.layer == layer;
        if let Some(mut span) = open.pop_if(same_layer) {
            let contiguous = offset.wrapping_sub(span.offset) == range.start - span.start;
            if contiguous && data.covers(layer, span.offset + (span.end - span.start)..offset) {
                span.own += len(&range);
                span.end = range.end;
                open.push(span);
                continue;
            }
            each(span);
        }
        open.push(Span {
            own: len(&range),
            layer,
            start: range.start,
            end: range.end,
            offset,
        });
    }
    open.into_iter().for_each(each);
}

/// Returns the length of a range.
pub(super) fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}
