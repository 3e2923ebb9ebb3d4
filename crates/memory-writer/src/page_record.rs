//! Identifies the pages that the staged file holds.

use crate::raw_diff::RawDiff;
use crate::sealing::FooterBuilder;

/// The record of the pages that the staged file holds.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a writer has only one")]
pub(crate) enum PageRecord {
    /// Nothing is written to a raw file.
    Empty,
    /// The holes of a raw diff.
    Holes(RawDiff),
    /// The caller of a raw diff whose holes may be unreliable:
    /// [`allow_ambiguous_diff`](crate::MemoryWriterOptions::allow_ambiguous_diff).
    Caller,
    /// All pages: a raw file that holds all of the RAM.
    All,
    /// The footer of a sealed or packed file.
    Footer(FooterBuilder),
}

impl PageRecord {
    /// Prepares for a write of all of the RAM: discards all earlier writes.
    pub(crate) fn begin_full(&mut self) {
        match self {
            Self::Footer(footer) => footer.begin_full(),
            Self::Empty | Self::Holes(_) | Self::Caller | Self::All => *self = Self::All,
        }
    }

    /// Returns the footer, for a file that gets one.
    pub(crate) fn footer(&self) -> Option<&FooterBuilder> {
        match self {
            Self::Footer(footer) => Some(footer),
            Self::Empty | Self::Holes(_) | Self::Caller | Self::All => None,
        }
    }
}
