//! The segments of a chain.

use std::fs::File;
use std::ops::Range;

use super::Chain;
use super::segment::{Segment, SegmentSource};
use crate::image::Image;

impl Chain {
    /// Returns the segments of the part of `within` that is inside the RAM: ascending, without
    /// gaps, each as long as possible.
    pub fn segments(&self, within: Range<u64>) -> impl Iterator<Item = Segment> + use<'_> {
        let within = within.start..within.end.min(self.ram_size());
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
                    (at..next, SegmentSource::Hole)
                }
            };
            at = range.end;
            Some(Segment { range, source })
        })
    }

    /// Advises the kernel to read the stored bytes of `range` into its cache. Errors are ignored:
    /// the bytes are read on demand then. Only Linux takes the advice.
    pub fn read_ahead(&self, range: Range<u64>) {
        for Segment { range, source } in self.segments(range) {
            if let SegmentSource::Stored { layer, offset } = source
                && let Ok(file) = self.image(layer).file()
            {
                will_need(&file, offset, range.end - range.start);
            }
        }
    }

    /// Returns the image of a layer.
    pub(crate) fn image(&self, layer: usize) -> &Image {
        &self.layers[layer]
    }
}

#[cfg(target_os = "linux")]
fn will_need(file: &File, offset: u64, len: u64) {
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
    // A file system without support for the advice reads on demand.
    let _ = nix::fcntl::posix_fadvise(file, offset as i64, len as i64, advice);
}

#[cfg(not(target_os = "linux"))]
fn will_need(_: &File, _: u64, _: u64) {}

#[cfg(test)]
mod tests {
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
                Some(layer) => SegmentSource::Stored {
                    layer,
                    offset: pages.start * PAGE,
                },
                None => SegmentSource::Hole,
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
                    source: SegmentSource::Stored {
                        layer: 0,
                        offset: within.start
                    }
                },
                Segment {
                    range: 4 * PAGE..within.end,
                    source: SegmentSource::Stored {
                        layer: 1,
                        offset: 4 * PAGE
                    }
                },
            ]
        );
        assert_eq!(chain.segments(PAGE..PAGE).count(), 0);
        assert_eq!(chain.segments(12 * PAGE..u64::MAX).count(), 0);
        let last = chain.segments(11 * PAGE..u64::MAX).last().unwrap();
        assert_eq!(last.range, 11 * PAGE..12 * PAGE);
    }
}
