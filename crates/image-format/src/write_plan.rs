//! The positions of the pages of one write.

use std::ops::Range;

use crate::extent::{Extent, push};
use crate::layout::Placement;

/// The offsets in the file of the pages of one write.
///
/// Takes 24 bytes for each extent.
#[derive(Clone, Debug)]
#[must_use = "the pages are not part of the image until `ExtentMap::merge`"]
pub struct WritePlan {
    pub(crate) placement: Placement,
    /// The offset of the first page.
    pub(crate) start: u64,
    /// In ascending order of file offsets, unless `unordered`.
    pub(crate) extents: Vec<Extent>,
    /// Whether pages were appended before pages of the plan.
    pub(crate) unordered: bool,
    /// The largest end of an extent in the file.
    pub(crate) end: u64,
    /// The offset of the next page that is appended.
    pub(crate) next: u64,
    /// The last extent that the map does not have.
    pub(crate) last_new: Option<Extent>,
    /// The number of extents that the map does not have.
    pub(crate) new: usize,
}

impl WritePlan {
    /// Adds pages that neither the plan nor the file has yet. Returns their place.
    ///
    /// Use it for a write whose pages are found while others are written: it begins with a plan of
    /// no runs. The pages may be appended in any order.
    pub fn append(&mut self, pages: Range<u64>) -> Extent {
        let len = pages.end.saturating_sub(pages.start);
        let file = match self.placement {
            Placement::ByOffset => self.start + pages.start,
            Placement::Appended => self.next,
        };
        let extent = Extent {
            guest: pages.start,
            file,
            len,
        };
        if len > 0 {
            self.next += len;
            let last = self.last_new.as_mut();
            if !last.is_some_and(|last| last.try_append(&extent)) {
                self.last_new = Some(extent);
                self.new += 1;
            }
            self.unordered |= self.extents.last().is_some_and(|last| file < last.file);
            self.end = self.end.max(file + len);
            push(&mut self.extents, extent);
        }
        extent
    }

    /// Returns the extents to write, in ascending order of file offsets, or in the order in which
    /// their pages were [appended](Self::append).
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Returns the number of extents that the map does not have.
    #[must_use]
    pub fn new_extents(&self) -> usize {
        self.new
    }

    /// Returns the number of bytes to write.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Returns whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Returns the file offset after the last byte to write.
    #[must_use]
    pub fn file_end(&self) -> u64 {
        self.end
    }

    /// Returns the part of an extent from the file offset `file` on, or `None` if no extent has
    /// that byte.
    ///
    /// Takes time proportional to the number of later extents if pages were appended before others.
    #[must_use]
    pub fn extent_at(&self, file: u64) -> Option<Extent> {
        let extent = match self.unordered {
            false => {
                let after = self.extents.partition_point(|extent| extent.file <= file);
                self.extents[after.checked_sub(1)?]
            }
            // The pages of a write are looked up soon after they were appended.
            true => {
                let mut newest_first = self.extents.iter().rev();
                *newest_first.find(|extent| extent.file_range().contains(&file))?
            }
        };
        let skipped = file - extent.file;
        (skipped < extent.len).then(|| Extent {
            guest: extent.guest + skipped,
            file,
            len: extent.len - skipped,
        })
    }

    /// Returns the guest offset of the byte at the file offset `file`, or `None` if no extent has
    /// that byte.
    #[must_use]
    pub fn guest_offset(&self, file: u64) -> Option<u64> {
        self.extent_at(file).map(|extent| extent.guest)
    }
}
