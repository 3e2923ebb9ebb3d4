//! Tracks the pages of a raw diff and checks that its holes identify them.

use std::fs::File;
use std::ops::Range;

use nix::unistd::fsync;
use sparse_file::{ExtentKind, HolesUnknown, PageHoles, PagesUnknown, extents};
use thiserror::Error;

use crate::page_set::PageSet;

/// The reason why a raw diff could not be read back: its pages cannot be distinguished from its
/// holes.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AmbiguousDiff {
    /// Holes do not identify written pages on the destination's file system.
    #[error(transparent)]
    Holes(#[from] PagesUnknown),
    /// A diff of every page has no hole, like a copy whose holes were filled with zeros.
    #[error("every page is dirty, so the file has no hole")]
    EveryPage,
    /// The file system reports other pages than those that were written.
    #[error("the file system reports the wrong state of the page at {offset:#x}")]
    NotAsWritten {
        /// The offset of the page in bytes.
        offset: u64,
    },
}

/// The pages of the memory file that were written.
#[derive(Debug)]
pub(crate) struct RawDiff {
    pages: PageSet,
    page_size: u64,
}

impl RawDiff {
    /// Creates a diff without pages in `file`.
    pub(crate) fn begin(file: &File, ram_size: u64, page_size: u64) -> Result<Self, AmbiguousDiff> {
        PageHoles::check_new(file, page_size)?;
        Ok(Self {
            pages: PageSet::new(ram_size, page_size),
            page_size,
        })
    }

    /// Checks that a hole remains after `runs` of whole pages, which ascend, are written too.
    pub(crate) fn check_hole_is_left(
        &self,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), AmbiguousDiff> {
        let size = self.pages.size();
        let mut at = 0;
        for run in runs.chain([size..size]) {
            if self.pages.first_missing(&(at..run.start)).is_some() {
                return Ok(());
            }
            at = run.end;
        }
        Err(AmbiguousDiff::EveryPage)
    }

    /// Records that a run of whole pages is being written.
    pub(crate) fn add(&mut self, run: &Range<u64>) {
        self.pages.add(run);
    }

    /// Checks that the holes of the written file are the pages that were not written.
    pub(crate) fn check_written(&self, file: &File) -> Result<(), AmbiguousDiff> {
        if self.pages.missing().next().is_none() {
            // Pages were marked during the write.
            return Err(AmbiguousDiff::EveryPage);
        }
        // Delayed allocation may cover more than was written, and blocks that are being written
        // count as reserved. A sync ends both. The commit syncs anyway, so sync here only if
        // needed.
        if self.check_extents(file).is_ok() {
            return Ok(());
        }
        fsync(file).map_err(|errno| PagesUnknown::Sync(errno.into()))?;
        self.check_extents(file)
    }

    fn check_extents(&self, file: &File) -> Result<(), AmbiguousDiff> {
        PageHoles::check_reserved(file)?;
        match self.first_difference(file)? {
            None => Ok(()),
            Some(offset) => Err(AmbiguousDiff::NotAsWritten { offset }),
        }
    }

    /// Returns the offset of the first page whose reported state is wrong.
    fn first_difference(&self, file: &File) -> Result<Option<u64>, AmbiguousDiff> {
        let failed = |error| PagesUnknown::from(HolesUnknown::Io(error));
        let mut at = 0;
        for extent in extents(file).map_err(failed)? {
            let extent = extent.map_err(failed)?;
            let Range { start, end } = extent.range;
            if !end.is_multiple_of(self.page_size) {
                return Ok(Some(end - end % self.page_size));
            }
            let other = match extent.kind {
                ExtentKind::Data => self.pages.first_missing(&(start..end)),
                ExtentKind::Hole => self.pages.first_in(&(start..end)),
            };
            if other.is_some() {
                return Ok(other);
            }
            at = end;
        }
        debug_assert_eq!(at, self.pages.size());
        Ok(None)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::FileExt;

    use rstest::rstest;

    use super::*;

    const PAGE: u64 = 4096;

    fn diff(pages: &[u64]) -> (tempfile::TempDir, File, RawDiff) {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(dir.path()).unwrap();
        file.set_len(8 * PAGE).unwrap();
        let mut diff = RawDiff::begin(&file, 8 * PAGE, PAGE).unwrap();
        for page in pages {
            diff.add(&(page * PAGE..(page + 1) * PAGE));
        }
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
            matches!(error, AmbiguousDiff::NotAsWritten { offset } if offset == at * PAGE),
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
                AmbiguousDiff::Holes(PagesUnknown::Reserved { offset: PAGE })
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
        assert!(matches!(error, AmbiguousDiff::EveryPage), "{error:?}");
    }

    #[test]
    fn passes_that_together_leave_no_hole_are_refused() {
        let (.., diff) = diff(&[0, 1, 2, 3]);
        diff.check_hole_is_left([4 * PAGE..7 * PAGE].into_iter())
            .unwrap();
        let error = diff.check_hole_is_left([3 * PAGE..8 * PAGE].into_iter());
        assert!(matches!(error, Err(AmbiguousDiff::EveryPage)));
    }
}
