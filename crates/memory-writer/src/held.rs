//! What says which pages the staged file holds.

use crate::raw_diff::RawDiff;
use crate::sealing::Sealing;

/// What says which pages the staged file holds.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it in a writer")]
pub(crate) enum Held {
    /// Nothing was written to a raw file so far.
    Nothing,
    /// The holes of a raw diff.
    ByHoles(RawDiff),
    /// The caller, of a raw diff whose holes may not:
    /// [`Options::allow_ambiguous_diff`](crate::Options::allow_ambiguous_diff).
    ByCaller,
    /// A raw file holds all of the RAM.
    All,
    /// The footer of a sealed or packed file.
    ByFooter(Sealing),
}

impl Held {
    /// Notes that all of the RAM is about to be written, and nothing of what was counts.
    pub(crate) fn begin_full(&mut self) {
        match self {
            Self::ByFooter(sealing) => sealing.begin_full(),
            Self::Nothing | Self::ByHoles(_) | Self::ByCaller | Self::All => *self = Self::All,
        }
    }

    /// What the footer is to say, if the file gets one.
    pub(crate) fn sealing(&self) -> Option<&Sealing> {
        match self {
            Self::ByFooter(sealing) => Some(sealing),
            Self::Nothing | Self::ByHoles(_) | Self::ByCaller | Self::All => None,
        }
    }
}
