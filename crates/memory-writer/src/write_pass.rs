//! One write of pages to the staged file.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;

use dirty_bitmap::PageSet;
use image_format::{Checksums, WritePlan};
use page_reader::PageReader;
use sparse_file::{RunSource, WriteError, WriteOptions, grow, write_runs};

use crate::progress::WriteProgress;
use crate::reader_source::ReaderSource;

/// Bytes by which a packed file grows if its final length is not known: direct writes inside its
/// size are faster than those that extend it. More than all requests in flight.
const GROWTH: u64 = 64 << 20;

/// The pages of a write, found before the write begins.
#[derive(Debug)]
pub(crate) enum Plan {
    /// Pages of a raw file.
    Raw(PageSet),
    /// Pages of a sealed or packed file, with their place in it.
    Placed(WritePlan),
}

impl Plan {
    /// Returns the number of bytes to write.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Raw(pages) => pages.page_count() * pages.page_size(),
            Self::Placed(plan) => plan.len(),
        }
    }
}

/// The file of a write, and its options.
pub(crate) struct WritePass<'w> {
    pub(crate) file: &'w File,
    pub(crate) options: &'w WriteOptions,
    pub(crate) progress: &'w WriteProgress,
}

impl WritePass<'_> {
    /// Writes runs of a raw file. Returns the number of bytes written.
    pub(crate) fn write_raw<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<u64, WriteError> {
        let progress = &mut |bytes| self.progress.wrote(bytes);
        write_runs(
            self.file,
            runs,
            &ReaderSource(reader),
            self.options,
            progress,
        )
    }

    /// Writes the pages of a plan, and computes their checksums. Returns the number of bytes
    /// written.
    pub(crate) fn write_plan<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        plan: &WritePlan,
        checksums: &mut Checksums,
    ) -> Result<u64, WriteError> {
        // If the file cannot get this size, the write reports the error.
        let _ = grow(self.file, plan.file_end());
        let source = PlacedPages {
            reader,
            locate: |file| {
                plan.extent_at(file)
                    .map(|extent| (extent.guest, extent.len))
            },
            checksums: RefCell::new(checksums),
        };
        let runs = plan.extents().iter().map(|extent| extent.file_range());
        let progress = &mut |bytes| self.progress.wrote(bytes);
        let written = write_runs(self.file, runs, &source, self.options, progress);
        written.map_err(|error| at_guest_offset(error, plan))
    }

    /// Writes runs that are found during the write, and adds them to `plan`, which has none.
    /// Returns the number of bytes written. Ends early if the plan has more than `max_extents`
    /// extents. The file will have at most `max_len` bytes.
    pub(crate) fn write_found<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
        plan: &mut WritePlan,
        checksums: &mut Checksums,
        (max_extents, max_len): (usize, u64),
    ) -> Result<u64, WriteError> {
        // The iterator adds to the plan, and the source looks up what it has added.
        let plan = RefCell::new(plan);
        let source = PlacedPages {
            reader,
            locate: |file| {
                let extent = plan.borrow().extent_at(file);
                extent.map(|extent| (extent.guest, extent.len))
            },
            checksums: RefCell::new(checksums),
        };
        let runs = runs.map_while(|run| {
            let mut plan = plan.borrow_mut();
            let place = plan.append(run).file_range();
            (plan.new_extents() <= max_extents).then_some(place)
        });
        let mut size = 0;
        let progress = &mut |bytes| {
            let end = plan.borrow().file_end();
            if end + GROWTH / 2 > size {
                size = max_len.min(end + GROWTH);
                // If the file cannot get this size, the write reports the error.
                let _ = grow(self.file, size);
            }
            self.progress.wrote(bytes)
        };
        let _ = grow(self.file, max_len.min(plan.borrow().file_end() + GROWTH));
        let written = write_runs(self.file, runs, &source, self.options, progress);
        written.map_err(|error| at_guest_offset(error, &plan.borrow()))
    }
}

/// Changes the offset of a source that could not be read from that in the file to that in the RAM.
fn at_guest_offset(mut error: WriteError, plan: &WritePlan) -> WriteError {
    if let WriteError::Source { offset, .. } = &mut error {
        *offset = plan.guest_offset(*offset).unwrap_or(*offset);
    }
    error
}

/// Guest memory that is read by its offset in the file.
struct PlacedPages<'p, R: ?Sized, L> {
    reader: &'p R,
    /// Returns the guest offset of the byte at an offset in the file, and the number of bytes that
    /// follow it in both.
    locate: L,
    /// A source is read through a shared reference, because the kernel may still read memory that
    /// it exposed. The writer reads it on one thread.
    checksums: RefCell<&'p mut Checksums>,
}

impl<R: PageReader + ?Sized, L: Fn(u64) -> Option<(u64, u64)>> RunSource for PlacedPages<'_, R, L> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut checksums = self.checksums.borrow_mut();
        let (mut offset, mut buf) = (offset, buf);
        while !buf.is_empty() {
            let placed = (self.locate)(offset);
            let (guest, left) =
                placed.ok_or_else(|| io::Error::other("no page is at this offset"))?;
            let len = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            let (now, later) = buf.split_at_mut(len);
            self.reader.read_at(guest, now)?;
            // Checksum the copy that is written: the guest may change the page concurrently.
            checksums.update(guest, now);
            (offset, buf) = (offset + len as u64, later);
        }
        Ok(())
    }
}
