//! The index of a chain: an ordered map from RAM offsets to layers.

use std::collections::BTreeMap;
use std::ops::Range;

use super::segment::SegmentSource;

/// The extents of a chain, keyed by their start in the RAM. Extents do not overlap. The gaps
/// between them are in no layer.
///
/// The amortized time to add an extent grows with the logarithm of their number: each replaced
/// extent was added once, and at most one extra extent remains at each end.
#[derive(Debug, Default)]
pub(crate) struct ExtentMap {
    extents: BTreeMap<u64, Extent>,
}

/// Bytes of the RAM that are contiguous in one layer's file, or zeros.
#[derive(Clone, Copy, Debug)]
struct Extent {
    end: u64,
    layer: u32,
    /// Offset in the layer's file, or [`ZEROS`].
    offset: u64,
}

/// Marks an extent of zeros. No file is that long.
const ZEROS: u64 = u64::MAX;

impl Extent {
    fn new(end: u64, source: SegmentSource) -> Self {
        match source {
            SegmentSource::Stored { layer, offset } => Self {
                end,
                layer: u32::try_from(layer).expect("no process has so many images"),
                offset,
            },
            SegmentSource::Zero | SegmentSource::Hole => Self {
                end,
                layer: 0,
                offset: ZEROS,
            },
        }
    }

    /// Returns the source of the bytes from `len` bytes after the start on.
    fn source(&self, len: u64) -> SegmentSource {
        match self.offset {
            ZEROS => SegmentSource::Zero,
            offset => SegmentSource::Stored {
                layer: self.layer as usize,
                offset: offset + len,
            },
        }
    }
}

impl ExtentMap {
    /// Adds `range` of a newer layer, which replaces older extents.
    pub(crate) fn add(&mut self, range: Range<u64>, source: SegmentSource) {
        if range.is_empty() {
            return;
        }
        self.remove(&range);
        if let Some((start, before)) = self.extents.range_mut(..range.start).next_back()
            && before.end == range.start
            && before.source(range.start - start) == source
        {
            before.end = range.end;
            return;
        }
        let extent = Extent::new(range.end, source);
        self.extents.insert(range.start, extent);
    }

    fn remove(&mut self, range: &Range<u64>) {
        let mut last = None;
        if let Some((start, before)) = self.extents.range_mut(..range.start).next_back()
            && before.end > range.start
        {
            last = Some((*start, *before));
            before.end = range.start;
        }
        // `BTreeMap::extract_if` would need Rust 1.91.
        while let Some((&start, &inside)) = self.extents.range(range.clone()).next() {
            self.extents.remove(&start);
            last = Some((start, inside));
        }
        // Only the last one can extend past the range.
        if let Some((start, extent)) = last
            && extent.end > range.end
        {
            let source = extent.source(range.end - start);
            self.extents
                .insert(range.end, Extent::new(extent.end, source));
        }
    }

    /// Returns the extents that overlap `within`, ascending and clipped to it.
    pub(crate) fn within(
        &self,
        within: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, SegmentSource)> + use<'_> {
        let Range { start, end } = within;
        let first = self.extents.range(..=start).next_back();
        let first = first.filter(|(_, extent)| extent.end > start && start < end);
        // `BTreeMap::range` panics on an inverted range.
        let after = start.saturating_add(1);
        let later = self.extents.range(after..end.max(after));
        first.into_iter().chain(later).map(move |(at, extent)| {
            let from = start.max(*at);
            (from..end.min(extent.end), extent.source(from - at))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 64;

    proptest! {
        /// Compares the map with a list of bytes, which every layer overwrites.
        #[test]
        fn newest_layer_wins_for_every_byte(
            layers in prop::collection::vec(
                prop::collection::vec((0..SIZE, 1..20_u64, 0..80_u64, any::<bool>()), 0..6),
                1..12,
            ),
            asked in (0..=SIZE, 0..=SIZE),
        ) {
            let mut map = ExtentMap::default();
            let mut oracle = vec![None; SIZE as usize];
            for (layer, extents) in layers.into_iter().enumerate() {
                for (start, len, offset, zeroed) in extents {
                    let end = SIZE.min(start + len);
                    let source = |at| match zeroed {
                        true => SegmentSource::Zero,
                        false => SegmentSource::Stored { layer, offset: offset + at - start },
                    };
                    map.add(start..end, source(start));
                    (start..end).for_each(|at| oracle[at as usize] = Some(source(at)));
                }
            }
            let within = asked.0.min(asked.1)..asked.0.max(asked.1);
            let mut found = vec![None; SIZE as usize];
            let mut last = within.start;
            for (range, source) in map.within(within.clone()) {
                prop_assert!(last <= range.start && !range.is_empty());
                last = range.end;
                for at in range.clone() {
                    found[at as usize] = Some(match source {
                        SegmentSource::Stored { layer, offset } => SegmentSource::Stored { layer, offset: offset + at - range.start },
                        other => other,
                    });
                }
            }
            prop_assert!(last <= within.end);
            let within = within.start as usize..within.end as usize;
            prop_assert_eq!(&found[within.clone()], &oracle[within]);
        }
    }

    #[test]
    fn replaced_extents_are_removed() {
        let mut map = ExtentMap::default();
        for layer in 0..1000 {
            for page in 0..10 {
                let offset = 4096 * (9 - page);
                let range = page * 4096..(page + 1) * 4096;
                map.add(range, SegmentSource::Stored { layer, offset });
            }
        }
        assert_eq!(map.extents.len(), 10);
    }
}
