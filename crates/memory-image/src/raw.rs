//! Finds the pages of a raw image by the holes of its file.

use std::fs::File;
use std::io;
use std::ops::Range;

use dirty_bitmap::{PageSet, coalesce};
use sparse_file::{ExtentKind, ExtentSource, Extents, PageHoles, extents, reported_extents};

use crate::error::{ChainError, OpenImageError, ReadAmbiguity, ReadImageError};
use crate::image::Image;

/// A way to list the extents of a file.
type List = fn(&File) -> io::Result<Extents<&File>>;

impl Image {
    /// Returns the pages of a full image that may be nonzero: all pages, if holes are not known to
    /// be reported correctly.
    pub(crate) fn stored_pages(&self, page_size: u64) -> Result<PageSet, ReadImageError> {
        self.pages_of(extents, page_size)
    }

    /// Returns the pages of a diff by its reported holes, which may be wrong.
    pub(crate) fn pages_by_reported_holes(
        &self,
        page_size: u64,
    ) -> Result<PageSet, ReadImageError> {
        self.pages_of(reported_extents, page_size)
    }

    /// Returns the ranges of the file that are reported as data, ascending, in bytes. Bytes past
    /// the end count as data.
    pub(crate) fn reported_data(&self) -> Result<Vec<Range<u64>>, ReadImageError> {
        let failed = |source| self.read_error(0, source);
        let file = self.file()?;
        let (mut data, mut end) = (Vec::new(), 0);
        for extent in reported_extents(&file).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            end = extent.range.end;
            if extent.kind == ExtentKind::Data {
                data.push(extent.range);
            }
        }
        data.push(end..u64::MAX);
        Ok(coalesce(data).collect())
    }

    fn pages_of(&self, list: List, page_size: u64) -> Result<PageSet, ReadImageError> {
        let mut pages = PageSet::new(0..self.size, page_size);
        if !self.has_file() {
            // A reader has no holes.
            pages.add(&(0..self.size));
            return Ok(pages);
        }
        self.each_data_extent(list, |data| {
            pages.add(&data);
            Ok(())
        })?;
        Ok(pages)
    }

    /// Returns the pages that a diff holds, if its holes show them.
    pub(crate) fn diff_pages(
        &self,
        page_size: u64,
        holes: &mut PageHoles,
    ) -> Result<PageSet, ChainError> {
        // Probe the directory of the file itself: a link to it may be on another file system.
        if !self.has_file() {
            return Err(self.ambiguous(ReadAmbiguity::NoFile));
        }
        let dir = self.directory().map_err(|error| match error {
            OpenImageError::NoDirectory { .. } => self.ambiguous(ReadAmbiguity::NoDirectory),
            error => error.into(),
        })?;
        let file = self.file()?;
        holes
            .check(&file, &dir, page_size)
            .map_err(|why| self.ambiguous(ReadAmbiguity::Holes(why)))?;
        let mut pages = PageSet::new(0..self.size, page_size);
        let source = self.each_data_extent(extents, |data| {
            let unaligned = [data.start, data.end]
                .into_iter()
                .find(|offset| !offset.is_multiple_of(page_size));
            if let Some(offset) = unaligned {
                return Err(self.ambiguous(ReadAmbiguity::TornPage { offset }));
            }
            pages.add(&data);
            Ok(())
        })?;
        match source {
            ExtentSource::Reported => Ok(pages),
            ExtentSource::CutShort => Err(self.ambiguous(ReadAmbiguity::Changed)),
            _ => Err(self.ambiguous(ReadAmbiguity::NoHoles)),
        }
    }

    fn each_data_extent<E: From<ReadImageError>>(
        &self,
        list: List,
        mut each: impl FnMut(Range<u64>) -> Result<(), E>,
    ) -> Result<ExtentSource, E> {
        let failed = |offset, source| self.read_error(offset, source);
        let file = self.file()?;
        let mut listing = list(&file).map_err(|source| failed(0, source))?;
        let mut at = 0;
        for extent in listing.by_ref() {
            let extent = extent.map_err(|source| failed(at, source))?;
            if extent.range.end > self.size {
                return Err(failed(self.size, io::Error::other("the file has grown")).into());
            }
            at = extent.range.end;
            if extent.kind == ExtentKind::Data {
                each(extent.range)?;
            }
        }
        if at < self.size {
            return Err(failed(at, io::Error::other("the file has shrunk")).into());
        }
        Ok(listing.source())
    }

    fn ambiguous(&self, why: ReadAmbiguity) -> ChainError {
        ChainError::AmbiguousDiff {
            path: self.path.clone(),
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_resized_file_are_an_error() {
        const PAGE: u64 = 4096;
        let file = tempfile::NamedTempFile::new().unwrap();
        let resize = |pages| file.as_file().set_len(pages * PAGE).unwrap();
        resize(4);
        let image = Image::open_raw(file.path()).unwrap();
        assert!(image.stored_pages(PAGE).is_ok());
        for pages in [3, 5] {
            resize(pages);
            let error = image.stored_pages(PAGE).unwrap_err();
            assert!(
                matches!(error, ReadImageError::Read { offset, .. } if offset == 4.min(pages) * PAGE),
                "{error:?}"
            );
        }
    }
}
