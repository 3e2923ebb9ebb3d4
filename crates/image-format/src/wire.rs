//! Constants and lengths of the footer's encoding.

use crate::version::{RAW_UNIT, Version};

/// The maximum length of a footer without its last 64 bytes: 1 GiB, for more than 40 million runs.
pub const MAX_FOOTER: u64 = 1 << 30;

pub(crate) const MAGIC: &[u8; 8] = b"memsnap\0";
pub(crate) const END_MAGIC: &[u8; 8] = b"memsnap\xff";
/// The length of the fields before the regions.
pub(crate) const HEADER: u64 = 96;
/// The length of the trailer, the last bytes of the file.
pub(crate) const TRAILER: u64 = 64;
/// The file offset of a run of zeros.
pub(crate) const ZERO_RUN: u64 = u64::MAX;

/// The number of entries of each part of a footer.
#[derive(Clone, Copy)]
pub(crate) struct PartCounts {
    pub(crate) regions: u64,
    pub(crate) runs: u64,
    pub(crate) checksums: u64,
    pub(crate) metadata: u64,
}

impl PartCounts {
    /// Returns the length of all parts in bytes. It saturates at a length that no file can have.
    pub(crate) fn len(self) -> u64 {
        let parts = [
            self.regions.saturating_mul(16),
            self.runs.saturating_mul(24),
            self.checksums.saturating_mul(32),
            self.metadata,
        ];
        parts.into_iter().fold(HEADER, u64::saturating_add)
    }
}

/// The padding, if there is any.
pub(crate) const PADDING: [u8; 8] = [0; 8];

/// Returns the length of the padding. See [`Footer::padding`].
pub(crate) fn padding(version: Version, end: u64) -> u64 {
    match version {
        Version::V1 => 0,
        Version::V2 if end.saturating_add(TRAILER).is_multiple_of(RAW_UNIT) => PADDING.len() as u64,
        Version::V2 => 0,
    }
}
