//! Segments: runs of RAM that are contiguous in one image's file, or zeros.

use std::ops::Range;

/// A run of the guest's RAM that is contiguous in one image's file, or all zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offsets in the guest's RAM, in bytes.
    pub range: Range<u64>,
    /// The location of its bytes.
    pub source: SegmentSource,
}

/// The location of a segment's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentSource {
    /// In an image's file.
    Stored {
        /// The number of the image in the chain. The base has number 0.
        layer: usize,
        /// The offset of the first byte in the file.
        offset: u64,
    },
    /// In no image: zeros, or clean memory in a chain of diffs.
    Hole,
    /// Zeros, because a diff records them as zeros, regardless of older images.
    Zero,
}
