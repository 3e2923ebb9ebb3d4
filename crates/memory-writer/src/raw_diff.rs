//! Tracks the pages of a raw diff and checks that its holes identify them.

use std::fs::File;
use std::ops::Range;

use dirty_bitmap::PageSet;
use nix::unistd::fsync;
use sparse_file::{ExtentKind, HolesUnknown, PageHoles, PagesUnknown, extents};

use crate::error::WriteAmbiguity;
use crate::geometry::Geometry;
use crate::trace;

/// The pages of the memory file that were written.
#[derive(Debug)]
pub(crate) struct RawDiff {
    pages: PageSet,
}

impl RawDiff {
    /// Creates a diff without pages in `file`.
    pub(crate) fn begin(file: &File, geometry: Geometry) -> Result<Self, WriteAmbiguity> {
        let checked = PageHoles::check_new(file, geometry.page_size).map_err(WriteAmbiguity::from);
        checked.inspect_err(|why| trace::holes_not_trusted(why))?;
        Ok(Self {
            pages: geometry.no_pages(),
        })
    }

    /// Checks that a hole remains after `pages` are written too.
    pub(crate) fn check_hole_is_left(&self, pages: &PageSet) -> Result<(), WriteAmbiguity> {
        let left = |gap| self.pages.gaps_in(gap).next().is_some();
        match pages.gaps().any(left) {
            true => Ok(()),
            false => Err(WriteAmbiguity::EveryPage),
        }
    }

    /// Records that pages are being written.
    pub(crate) fn add(&mut self, pages: &PageSet) {
        self.pages.union(pages);
    }

    /// Checks that the holes of the written file are the pages that were not written.
    pub(crate) fn check_written(&self, file: &File) -> Result<(), WriteAmbiguity> {
        if self.pages.gaps().next().is_none() {
            // Pages were marked during the write.
            return Err(WriteAmbiguity::EveryPage);
        }
        // Delayed allocation may cover more than was written, and blocks that are being written
        // count as reserved. A sync ends both. The commit syncs anyway, so sync here only if
        // needed.
        let Err(why) = self.check_extents(file) else {
            return Ok(());
        };
        trace::synced_for_holes(&why);
        fsync(file).map_err(|errno| PagesUnknown::Sync(errno.into()))?;
        self.check_extents(file)
            .inspect_err(|why| trace::holes_not_trusted(why))
    }

    fn check_extents(&self, file: &File) -> Result<(), WriteAmbiguity> {
        PageHoles::check_reserved(file)?;
        match self.first_difference(file)? {
            None => Ok(()),
            Some(offset) => Err(WriteAmbiguity::NotAsWritten { offset }),
        }
    }

    /// Returns the offset of the first page whose reported state is wrong.
    fn first_difference(&self, file: &File) -> Result<Option<u64>, WriteAmbiguity> {
        let failed = |error| PagesUnknown::from(HolesUnknown::Io(error));
        let (size, page_size) = (self.pages.range().end, self.pages.page_size());
        let mut at = 0;
        for extent in extents(file).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            let Range { start, end } = extent.range;
            if end > size {
                return Ok(Some(size));
            }
            if !end.is_multiple_of(page_size) {
                return Ok(Some(end - end % page_size));
            }
            let other = match extent.kind {
                ExtentKind::Data => self.pages.gaps_in(start..end).next(),
                ExtentKind::Hole => self.pages.runs_in(start..end).next(),
            };
            if let Some(other) = other {
                return Ok(Some(other.start));
            }
            at = end;
        }
        Ok((at < size).then_some(at))
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::os::unix::fs::FileExt;

    use rstest::rstest;

    use super::*;

    const PAGE: u64 = 4096;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(0..8 * PAGE, PAGE);
        for page in pages {
            set.add(&(page * PAGE..(page + 1) * PAGE));
        }
        set
    }

    fn diff(pages: &[u64]) -> (tempfile::TempDir, File, RawDiff) {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(dir.path()).unwrap();
        file.set_len(8 * PAGE).unwrap();
        let geometry = Geometry::new(8 * PAGE, PAGE).unwrap();
        let mut diff = RawDiff::begin(&file, geometry).unwrap();
        diff.add(&set(pages));
        (dir, file, diff)
    }

    #[rstest]
    #[case::written_page_is_a_hole(&[2, 5], &[2], 5)]
    #[case::hole_was_filled(&[2], &[2, 6], 6)]
    #[case::nothing_was_written(&[0], &[], 0)]
    fn file_with_other_pages_is_refused(
        #[case] said: &[u64],
        #[case] held: &[u64],
        #[case] at: u64,
    ) {
        let (_dir, file, diff) = diff(said);
        for page in held {
            file.write_all_at(&[7; PAGE as usize], page * PAGE).unwrap();
        }
        let error = diff.check_written(&file).unwrap_err();
        assert!(
            matches!(error, WriteAmbiguity::NotAsWritten { offset } if offset == at * PAGE),
            "{error:?}"
        );
    }

    #[test]
    fn page_that_is_partly_a_hole_is_refused() {
        const LARGE_PAGE: u64 = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(dir.path()).unwrap();
        file.set_len(4 * LARGE_PAGE).unwrap();
        let geometry = Geometry::new(4 * LARGE_PAGE, LARGE_PAGE).unwrap();
        let mut diff = RawDiff::begin(&file, geometry).unwrap();
        let mut pages = geometry.no_pages();
        pages.add(&(2 * LARGE_PAGE..3 * LARGE_PAGE));
        diff.add(&pages);
        file.write_all_at(&[7; PAGE as usize], 2 * LARGE_PAGE)
            .unwrap();
        let error = diff.check_written(&file).unwrap_err();
        assert!(
            matches!(error, WriteAmbiguity::NotAsWritten { offset } if offset == 2 * LARGE_PAGE),
            "{error:?}"
        );
    }

    #[rstest]
    #[case::shrunk(4, 4)]
    #[case::grown(9, 8)]
    fn resized_file_is_refused(#[case] pages: u64, #[case] at: u64) {
        let (_dir, file, diff) = diff(&[0]);
        file.write_all_at(&[7; PAGE as usize], 0).unwrap();
        diff.check_written(&file).unwrap();
        file.set_len(pages * PAGE).unwrap();
        let error = diff.check_written(&file).unwrap_err();
        assert!(
            matches!(error, WriteAmbiguity::NotAsWritten { offset } if offset == at * PAGE),
            "{error:?}"
        );
    }

    #[test]
    fn file_with_reserved_blocks_is_refused() {
        let (_dir, file, diff) = diff(&[0]);
        sparse_file::reserve(&file, 8 * PAGE).unwrap();
        file.write_all_at(&[7; PAGE as usize], 0).unwrap();
        let checked = diff.check_written(&file);
        // tmpfs lists reserved blocks as holes until they are written.
        if sparse_file::file_system_name(&file).unwrap() == "tmpfs" {
            return checked.unwrap();
        }
        let error = checked.unwrap_err();
        assert!(
            matches!(
                error,
                WriteAmbiguity::Holes(PagesUnknown::Reserved { offset: PAGE })
            ),
            "{error:?}"
        );
    }

    #[test]
    fn file_with_exactly_the_written_pages_is_accepted() {
        let (_dir, file, diff) = diff(&[0, 3]);
        for page in [0, 3] {
            file.write_all_at(&[0; PAGE as usize], page * PAGE).unwrap();
        }
        diff.check_written(&file).unwrap();
    }

    /// A bitmap that is marked during the write may yield more pages than were checked.
    #[test]
    fn file_of_every_page_is_refused() {
        let (_dir, file, diff) = diff(&[0, 1, 2, 3, 4, 5, 6, 7]);
        file.write_all_at(&[7; 8 * PAGE as usize], 0).unwrap();
        let error = diff.check_written(&file).unwrap_err();
        assert!(matches!(error, WriteAmbiguity::EveryPage), "{error:?}");
    }

    #[test]
    fn passes_that_together_leave_no_hole_are_refused() {
        let (.., diff) = diff(&[0, 1, 2, 3]);
        diff.check_hole_is_left(&set(&[4, 5, 6])).unwrap();
        let error = diff.check_hole_is_left(&set(&[3, 4, 5, 6, 7]));
        assert!(matches!(error, Err(WriteAmbiguity::EveryPage)));
    }
}
