//! Bytes of a recycled file that are not overwritten yet.

use std::fs::File;
use std::io;
use std::ops::Range;

use dirty_bitmap::PageSet;
use image_format::{Layout, Placement};
use page_reader::PageReader;
use sparse_file::{WriteOptions, ZeroError, zero_ranges};

use crate::geometry::Geometry;

/// The pages of a file whose old bytes are not overwritten yet.
#[derive(Debug)]
pub(crate) struct StalePages {
    /// The pages that were written. All others have their old bytes.
    written: PageSet,
}

impl StalePages {
    /// Creates a set of all pages in `range` of a file.
    pub(crate) fn all(range: Range<u64>, page_size: u64) -> Self {
        Self {
            written: PageSet::new(range, page_size),
        }
    }

    /// Creates the set of all pages of a file, if pages that are not written leave gaps in it.
    pub(crate) fn of_new_writes(layout: Layout, geometry: Geometry) -> Option<Self> {
        let Geometry {
            ram_size,
            page_size,
        } = geometry;
        let start = layout.data_start(page_size);
        match layout.placement() {
            Placement::ByOffset => Some(Self::all(start..start + ram_size, page_size)),
            Placement::Appended => None,
        }
    }

    /// Removes a run of bytes of the file that is being written. It consists of whole pages.
    pub(crate) fn remove(&mut self, run: &Range<u64>) {
        self.written.add(run);
    }

    /// Removes pages that are being written.
    pub(crate) fn remove_pages(&mut self, pages: &PageSet) {
        self.written.union(pages);
    }

    /// Returns the maximal runs of bytes that were not written, in ascending order. A block that
    /// several pages share is freed if none of them is written.
    fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.written.gaps()
    }

    /// Punches holes as in a new file, or writes zeros where the file system has no holes.
    pub(crate) fn wipe(&self, file: &File, options: &WriteOptions) -> Result<(), ZeroError> {
        zero_ranges(file, self.runs(), options)
    }
}

/// A reader that returns zeros at every offset.
pub(crate) struct Zeros;

impl PageReader for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn reader_of_zeros_overwrites_the_buffer() {
        let mut buf = [7; 9];
        Zeros.read_at(3, &mut buf).unwrap();
        assert_eq!(buf, [0; 9]);
    }

    #[rstest]
    #[case::nothing_written(&[], &[0..65536])]
    #[case::all_written(&[0..65536], &[])]
    #[case::ends(&[0..4096, 61440..65536], &[4096..61440])]
    #[case::middle_in_any_order(&[8192..12288, 4096..8192, 4096..8192], &[0..4096, 12288..65536])]
    #[case::every_other(&[0..4096, 8192..12288, 16384..65536], &[4096..8192, 12288..16384])]
    fn stale_runs_are_those_not_removed(
        #[case] written: &[Range<u64>],
        #[case] left: &[Range<u64>],
    ) {
        let mut stale = StalePages::all(0..65536, 4096);
        written.iter().for_each(|run| stale.remove(run));
        assert_eq!(stale.runs().collect::<Vec<_>>(), left);
    }
}
