//! Runs of pages and where their bytes are.

use std::ops::Range;

/// Consecutive pages with the same storage state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The guest offset of the first byte.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// The location of the bytes.
    pub stored: Storage,
}

/// The location of the bytes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the file, at this offset.
    At(u64),
    /// Not in the file. They read as zeros.
    Zeros,
}

impl Run {
    /// Creates a run of the guest offsets `range` whose bytes are at `offset` of the file.
    #[must_use]
    pub fn present(range: Range<u64>, offset: u64) -> Self {
        Self {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            stored: Storage::At(offset),
        }
    }

    /// Creates a run of the guest offsets `range` whose bytes are zeros.
    #[must_use]
    pub fn zeros(range: Range<u64>) -> Self {
        Self {
            stored: Storage::Zeros,
            ..Self::present(range, 0)
        }
    }

    /// Returns the guest offsets of the run. The end of an invalid run saturates.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.len)
    }

    /// Returns the file offset of the byte at the guest offset `from`, or `None` if the run is
    /// zeros.
    #[must_use]
    pub fn stored_at(&self, from: u64) -> Option<u64> {
        match self.stored {
            Storage::At(offset) => Some(offset + (from - self.start)),
            Storage::Zeros => None,
        }
    }
}
