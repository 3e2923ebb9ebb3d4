//! Segments: runs of RAM that are contiguous in one image's file, or zeros.

use std::ops::Range;

use super::Chain;
use crate::image::Image;

/// A run of the guest's RAM that is contiguous in one image's file, or all zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Offsets in the guest's RAM, in bytes.
    pub(crate) range: Range<u64>,
    pub(crate) source: Source,
}

/// The location of a segment's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// In a layer's file, starting at this offset.
    Stored { layer: usize, offset: u64 },
    /// Zeros, because no layer has the pages.
    Hole,
    /// Zeros, because a diff records them as zeros, regardless of older layers.
    Zero,
}

impl Chain {
    /// Returns the segments of `within`, which must end inside the RAM: ascending, without gaps,
    /// each as long as possible.
    pub(crate) fn segments(&self, within: Range<u64>) -> impl Iterator<Item = Segment> + use<'_> {
        let Range { start: mut at, end } = within;
        let mut extents = self.extents.within(within).peekable();
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (range, source) = match extents.next_if(|(range, _)| range.start == at) {
                Some(extent) => extent,
                None => {
                    let next = extents.peek().map_or(end, |(range, _)| range.start);
                    (at..next, Source::Hole)
                }
            };
            at = range.end;
            Some(Segment { range, source })
        })
    }

    /// Returns the image of a layer.
    pub(crate) fn image(&self, layer: usize) -> &Image {
        &self.layers[layer]
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const PAGE: u64 = 4096;

    /// Returns a chain whose base stores pages 2 to 8 of 12.
    fn chain(dir: &tempfile::TempDir) -> Chain {
        let file = |name: &str, stored: Range<u64>| {
            let path = dir.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_len(12 * PAGE).unwrap();
            let bytes = vec![1; ((stored.end - stored.start) * PAGE) as usize];
            file.write_all_at(&bytes, stored.start * PAGE).unwrap();
            path
        };
        let mut chain = Chain::open_raw(file("base", 2..8), PAGE).unwrap();
        for (name, pages) in [("first", 4..6), ("second", 5..7)] {
            let bytes = pages.start * PAGE..pages.end * PAGE;
            chain.push_pages(file(name, pages), [bytes]).unwrap();
        }
        chain
    }

    #[test]
    fn segments_cover_the_ram_with_the_newest_images() {
        let dir = tempfile::tempdir().unwrap();
        let expected = [
            (0..2, None),
            (2..4, Some(0)),
            (4..5, Some(1)),
            (5..7, Some(2)),
            (7..8, Some(0)),
            (8..12, None),
        ];
        let expected = expected.map(|(pages, layer): (Range<u64>, _)| Segment {
            range: pages.start * PAGE..pages.end * PAGE,
            source: match layer {
                Some(layer) => Source::Stored {
                    layer,
                    offset: pages.start * PAGE,
                },
                None => Source::Hole,
            },
        });
        let chain = chain(&dir);
        assert!(chain.segments(0..12 * PAGE).eq(expected));
    }

    #[test]
    fn segments_are_clipped_to_the_requested_range() {
        let dir = tempfile::tempdir().unwrap();
        let chain = chain(&dir);
        let within = 3 * PAGE + 100..4 * PAGE + 1;
        let segments: Vec<_> = chain.segments(within.clone()).collect();
        assert_eq!(
            segments,
            [
                Segment {
                    range: within.start..4 * PAGE,
                    source: Source::Stored {
                        layer: 0,
                        offset: within.start
                    }
                },
                Segment {
                    range: 4 * PAGE..within.end,
                    source: Source::Stored {
                        layer: 1,
                        offset: 4 * PAGE
                    }
                },
            ]
        );
        assert_eq!(chain.segments(PAGE..PAGE).count(), 0);
    }
}
