//! Layouts of image files.

use std::fmt;

use crate::version::MIN_HEADER;

/// The order of the pages in an image file, and whether a footer describes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Pages at their guest offsets and nothing else. Any program that maps or merges raw memory
    /// files can use it. Only the holes of the file record which pages a diff holds.
    #[default]
    Raw,
    /// The same, with a [footer](crate::Footer) after the last page of the RAM: the pages that are
    /// present, zero or clean, the parent of a diff, and checksums. The first `ram_size` bytes are
    /// those of a raw file.
    Sealed,
    /// A header that contains the length of the file, the pages that are present, one after
    /// another, and the same footer. It needs no holes. It cannot be mapped directly.
    Packed,
}

impl Layout {
    /// All layouts.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Sealed, Self::Packed];

    /// Returns the name of the layout: `raw`, `sealed` or `packed`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Sealed => "sealed",
            Self::Packed => "packed",
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Returns the file offset of the first page in a packed image of version 2.
#[must_use]
pub fn packed_start(page_size: u64) -> u64 {
    MIN_HEADER.max(page_size)
}
