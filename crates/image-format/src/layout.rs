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

    /// Returns the properties that determine where bytes are in a file of this layout.
    const fn properties(self) -> Properties {
        match self {
            Self::Raw => Properties {
                name: "raw",
                number: None,
                header: false,
                placement: Placement::ByOffset,
            },
            Self::Sealed => Properties {
                name: "sealed",
                number: Some(0),
                header: false,
                placement: Placement::ByOffset,
            },
            Self::Packed => Properties {
                name: "packed",
                number: Some(1),
                header: true,
                placement: Placement::Appended,
            },
        }
    }

    /// Returns the name of the layout: `raw`, `sealed` or `packed`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.properties().name
    }

    /// Returns whether a [footer](crate::Footer) describes the pages. Without one, the caller must
    /// know the format, and the file stores no id, parent, regions or metadata.
    #[must_use]
    pub const fn has_footer(self) -> bool {
        self.properties().number.is_some()
    }

    /// Returns whether a file of the current version begins with a [header](crate::Header).
    #[must_use]
    pub const fn has_header(self) -> bool {
        self.properties().header
    }

    /// Returns where the pages are, behind the header if there is one.
    #[must_use]
    pub const fn placement(self) -> Placement {
        self.properties().placement
    }

    /// Returns whether each page is at its guest offset, so that a file can be mapped as RAM.
    #[must_use]
    pub const fn is_in_place(self) -> bool {
        matches!(self.placement(), Placement::ByOffset) && !self.has_header()
    }

    /// Returns the file offset of the first page in an image of the current version: the length of
    /// the header, or 0.
    #[must_use]
    pub fn data_start(self, page_size: u64) -> u64 {
        match self.has_header() {
            true => packed_start(page_size),
            false => 0,
        }
    }

    /// Returns the number by which a footer names the layout, or `None` for a layout without one.
    pub(crate) fn number(self) -> Option<u8> {
        self.properties().number
    }

    /// Returns the layout that a footer names by `number`.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        let named = |layout: &Self| layout.number() == Some(number);
        Self::ALL.into_iter().find(named)
    }
}

/// Where the pages of an image are, counted from the first byte behind the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Each page is at its guest offset. The pages that are not present leave gaps.
    ByOffset,
    /// The present pages follow one another without gaps, in the order in which they were written.
    Appended,
}

/// What a layout is.
struct Properties {
    name: &'static str,
    /// The number in a footer, if the layout has one. It never changes.
    number: Option<u8>,
    header: bool,
    placement: Placement,
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn layouts_differ_in_name_and_number() {
        let names: HashSet<_> = Layout::ALL.map(Layout::name).into();
        assert_eq!(names.len(), Layout::ALL.len());
        for layout in Layout::ALL {
            let found = layout.number().and_then(Layout::from_number);
            assert_eq!(found, layout.has_footer().then_some(layout));
        }
        assert_eq!(Layout::from_number(0xff), None);
    }

    #[test]
    fn only_a_layout_without_header_is_in_place() {
        let in_place = Layout::ALL
            .into_iter()
            .filter(|layout| layout.is_in_place());
        assert!(in_place.eq([Layout::Raw, Layout::Sealed]));
    }

    /// Without a footer, nothing states the version or the length of a header.
    #[test]
    fn a_layout_with_a_header_has_a_footer() {
        let with_header = Layout::ALL.into_iter().filter(|layout| layout.has_header());
        assert!({ with_header }.all(Layout::has_footer));
    }
}
