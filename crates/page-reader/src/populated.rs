//! Ranges that may hold nonzero bytes.

use std::ops::Range;

/// The ranges of byte offsets that [`PageReader::populated`](crate::PageReader::populated) returns.
///
/// They are ascending, not empty, and do not overlap. Two of them may be adjacent.
pub type PopulatedRanges<'a> = Box<dyn Iterator<Item = Range<u64>> + 'a>;

/// Returns all of `range` as one range that may be populated, or nothing if it is empty.
pub(crate) fn unknown(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    Some(range).filter(|range| !range.is_empty()).into_iter()
}
