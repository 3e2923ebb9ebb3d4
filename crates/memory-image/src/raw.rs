//! What the holes of a raw image say.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use sparse_file::{Capabilities, Kind, Knowledge, SeekHole, WrittenZeros, extents};

use crate::error::{ImageError, Unclear};
use crate::image::Image;
use crate::page_set::PageSet;

impl Image {
    /// The pages of a full image that may hold anything but zeros.
    pub(crate) fn stored_pages(&self, page_size: u64) -> Result<PageSet, ImageError> {
        let mut pages = PageSet::new(page_size);
        self.each_data_extent(|data| {
            pages.add(&data);
            Ok(())
        })?;
        Ok(pages)
    }

    /// The pages that a diff holds, if its holes can be believed. Directories in `believed` were probed before.
    pub(crate) fn diff_pages(
        &self,
        page_size: u64,
        believed: &mut HashSet<PathBuf>,
    ) -> Result<PageSet, ImageError> {
        self.check_holes_are_kept(page_size, believed)?;
        self.pages_by_holes(page_size)
    }

    fn pages_by_holes(&self, page_size: u64) -> Result<PageSet, ImageError> {
        let mut pages = PageSet::new(page_size);
        let knowledge = self.each_data_extent(|data| {
            let torn = [data.start, data.end]
                .into_iter()
                .find(|offset| !offset.is_multiple_of(page_size));
            if let Some(offset) = torn {
                return Err(self.unclear(Unclear::TornPage { offset }));
            }
            pages.add(&data);
            Ok(())
        })?;
        match knowledge {
            Knowledge::Reported => Ok(pages),
            _ => Err(self.unclear(Unclear::NoHoles)),
        }
    }

    fn check_holes_are_kept(
        &self,
        page_size: u64,
        believed: &mut HashSet<PathBuf>,
    ) -> Result<(), ImageError> {
        let failed = |source| ImageError::Open {
            path: self.path.clone(),
            source,
        };
        // Where the file is: a link to it may stand on another file system.
        let path = std::fs::canonicalize(&self.path).map_err(failed)?;
        let dir = path.parent().unwrap_or(&path);
        if mount_of(&*self.file()?) != mount_of(&File::open(dir).map_err(failed)?) {
            return Err(self.unclear(Unclear::MountedAlone));
        }
        if believed.contains(dir) {
            return Ok(());
        }
        let capabilities =
            Capabilities::probe(dir).map_err(|error| self.unclear(Unclear::Probe(error)))?;
        if tells_pages_from_gaps(&capabilities, page_size) {
            believed.insert(dir.to_owned());
            return Ok(());
        }
        Err(self.unclear(Unclear::FileSystem {
            file_system: capabilities.file_system,
            page_size,
        }))
    }

    fn each_data_extent(
        &self,
        mut each: impl FnMut(Range<u64>) -> Result<(), ImageError>,
    ) -> Result<Knowledge, ImageError> {
        let failed = |offset, source| self.read_error(offset, source);
        let file = self.file()?;
        let mut listing = extents(&file).map_err(|source| failed(0, source))?;
        let mut at = 0;
        for extent in listing.by_ref() {
            let extent = extent.map_err(|source| failed(at, source))?;
            if extent.range.end > self.size {
                return Err(failed(self.size, io::Error::other("the file has grown")));
            }
            at = extent.range.end;
            if extent.kind == Kind::Data {
                each(extent.range)?;
            }
        }
        Ok(listing.knowledge())
    }

    fn unclear(&self, why: Unclear) -> ImageError {
        ImageError::UnclearDiff {
            path: self.path.clone(),
            why,
        }
    }
}

/// Whether what was written, zeros too, is data, and all else a hole, down to the page.
fn tells_pages_from_gaps(here: &Capabilities, page_size: u64) -> bool {
    here.written_zeros == WrittenZeros::Data
        && matches!(here.seek_hole, SeekHole::Exact { granularity } if granularity <= page_size)
}

/// The mount through which `file` was opened, where the system tells; only Linux can mount a single file.
fn mount_of(file: &File) -> Option<String> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let mount = info.lines().find(|line| line.starts_with("mnt_id:"))?;
    Some(mount.to_owned())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::holes_of_a_page(4096, WrittenZeros::Data, true)]
    #[case::larger_holes(8192, WrittenZeros::Data, false)]
    #[case::a_page_that_the_guest_zeroed_is_a_hole(4096, WrittenZeros::Hole, false)]
    fn pages_are_told_from_gaps_only_where_both_keep_their_kind(
        #[case] granularity: u64,
        #[case] written_zeros: WrittenZeros,
        #[case] told: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut here = Capabilities::probe(dir.path()).unwrap();
        here.seek_hole = SeekHole::Exact { granularity };
        here.written_zeros = written_zeros;
        assert_eq!(tells_pages_from_gaps(&here, 4096), told);
    }
}
