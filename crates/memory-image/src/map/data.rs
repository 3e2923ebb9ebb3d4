//! The parts of the images' files that a mapping may cover.
//!
//! tmpfs allocates a page of the file when a hole is touched through a mapping, even a private
//! mapping of a file that is open for reading only. In a raw diff this turns clean memory into
//! zeros for the next reader of its holes. So no mapping of a diff covers a hole, on any file
//! system: the type of a file system does not show where its pages are stored (overlayfs).

use std::ops::Range;

use crate::chain::Chain;
use crate::chain::segment::{Segment, SegmentSource};
use crate::error::ReadImageError;

/// The data of a chain's files, by layer, as the file systems report it. A full base counts
/// entirely as data: its holes are zeros, whether or not they are filled.
pub(super) struct FileData {
    /// Ascending, in bytes. A layer whose file was not examined has one run of everything.
    layers: Vec<Vec<Range<u64>>>,
}

impl FileData {
    /// Treats all files as data.
    pub(super) fn all(chain: &Chain) -> Self {
        let all = std::iter::once(0..u64::MAX).collect();
        Self {
            layers: vec![all; chain.len()],
        }
    }

    /// Lists the data of the diffs that hold any page of the RAM. Opens each file once.
    pub(super) fn list(chain: &Chain) -> Result<Self, ReadImageError> {
        let mut data = Self::all(chain);
        let mut used = vec![false; chain.len()];
        for Segment { source, .. } in chain.segments(0..chain.ram_size()) {
            if let SegmentSource::Stored { layer, .. } = source {
                used[layer] = true;
            }
        }
        for layer in (1..chain.len()).filter(|layer| used[*layer]) {
            data.layers[layer] = chain.image(layer).reported_data()?;
        }
        Ok(data)
    }

    /// Returns whether these bytes of a layer's file are all data.
    pub(super) fn covers(&self, layer: usize, bytes: Range<u64>) -> bool {
        bytes.is_empty() || {
            let run = self.run_at(layer, bytes.start);
            run.is_some_and(|run| run.start <= bytes.start && bytes.end <= run.end)
        }
    }

    /// Returns the segments of the chain, split where data of their files begins or ends, and
    /// whether each is data.
    pub(super) fn segments<'c>(
        &'c self,
        chain: &'c Chain,
    ) -> impl Iterator<Item = (Segment, bool)> + use<'c> {
        chain
            .segments(0..chain.ram_size())
            .flat_map(move |segment| {
                let mut rest = Some(segment);
                std::iter::from_fn(move || {
                    let Segment { range, source } = rest.take()?;
                    let SegmentSource::Stored { layer, offset } = source else {
                        return Some((Segment { range, source }, false));
                    };
                    let (is_data, end) = match self.run_at(layer, offset) {
                        Some(run) if run.start <= offset => (true, run.end),
                        Some(run) => (false, run.start),
                        None => (false, u64::MAX),
                    };
                    let cut = range.end.min(range.start.saturating_add(end - offset));
                    if cut < range.end {
                        let offset = offset + (cut - range.start);
                        rest = Some(Segment {
                            range: cut..range.end,
                            source: SegmentSource::Stored { layer, offset },
                        });
                    }
                    let range = range.start..cut;
                    Some((Segment { range, source }, is_data))
                })
            })
    }

    /// Returns the first run of data that ends after this offset of a layer's file.
    fn run_at(&self, layer: usize, offset: u64) -> Option<&Range<u64>> {
        let runs = &self.layers[layer];
        runs.get(runs.partition_point(|run| run.end <= offset))
    }
}
