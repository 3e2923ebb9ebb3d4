//! Writes of all of the RAM.

use std::fs::File;
use std::ops::Range;

use dirty_bitmap::Coverage;
use page_reader::{NonzeroRuns, PageReader, Touched};
use sparse_file::{Pass, SpaceError, share_blocks};

use super::{EpochCheck, MemoryWriter, State};
use crate::error::SnapshotError;
use crate::geometry::{Geometry, reader_start};
use crate::page_record::PageRecord;
use crate::progress::WriteProgress;
use crate::reader_source::{check_source, name_cause};
use crate::stale_pages::StalePages;
use crate::trace;
use crate::write_pass::WritePass;

impl MemoryWriter {
    /// Writes all of the RAM: every byte of `[0, ram_size)`. Pages of zeros are written too, unless
    /// [`MemoryWriterOptions::skip_zeros`](crate::MemoryWriterOptions::skip_zeros) or
    /// [`MemoryWriterOptions::skip_untouched`](crate::MemoryWriterOptions::skip_untouched) skips
    /// them.
    ///
    /// RAM that the reader [knows](page_reader::PageReader::populated) to be untouched is not read,
    /// because a read would make the host allocate it. Zeros are written in its place.
    ///
    /// # Errors
    /// - [`SnapshotError::FullWithParent`], [`SnapshotError::Regions`] if the reader has other
    ///   regions than a sealed file would record, or [`SnapshotError::ReaderSize`] if its RAM has
    ///   another size than the file: nothing was written.
    /// - [`SnapshotError::MemoryIo`], [`SnapshotError::Cancelled`] or, for more runs than a footer
    ///   can list, [`SnapshotError::Seal`]: the writer can no longer be committed.
    pub fn write_full<R: PageReader + ?Sized>(&mut self, reader: &R) -> Result<(), SnapshotError> {
        self.check_full()?;
        self.check_layout(reader)?;
        self.set_layout(reader);
        let written_before = self.state != State::Empty;
        self.begin()?;
        let began = Coverage::begin_full();
        self.pages.begin_full();
        let skip = self.skip;
        if skip.is_enabled() && written_before {
            // A full dump that skips zeros must not leave bytes of an earlier write.
            self.stale_pages = StalePages::of_new_writes(self.layout, self.geometry);
        }
        let ram_size = self.geometry.ram_size;
        let reader = &match self.read_untouched && !skip.untouched {
            true => Touched::unknown(reader, ram_size).faults_in(false),
            false => Touched::new(reader, ram_size),
        };
        match skip.is_enabled() {
            true => self.write_nonzero(reader),
            false => {
                let all = std::iter::once(0..ram_size);
                let plan = self.plan(all)?;
                self.write_plan(reader, plan, Pass::Full).map(drop)
            }
        }
        .map_err(|error| name_cause(reader, error))?;
        check_source(reader, self.dest_path())?;
        self.reader_start = reader_start(reader);
        self.written.add_full(began);
        self.state = State::Complete;
        Ok(())
    }

    /// Copies a raw image into the snapshot by sharing its blocks, where [the file system
    /// can](sparse_file::share_blocks). This takes no time, and no space until a page is written.
    ///
    /// Returns false and writes nothing where the file system cannot share blocks, and for a layout
    /// that is not raw. [Write](Self::write_full) the bytes of the image in that case.
    ///
    /// # Errors
    /// Returns [`SnapshotError::MemoryIo`]: the writer can no longer be committed.
    pub fn reflink_full(&mut self, image: &File) -> Result<bool, SnapshotError> {
        if self.pages.footer().is_some() {
            return Ok(false);
        }
        let before = self.state;
        self.begin()?;
        match share_blocks(image, self.staged.file(), self.geometry.ram_size) {
            Ok(()) => {}
            Err(why @ SpaceError::Unsupported { .. }) => {
                trace::blocks_not_shared(self.staged.dest_path(), &why);
                self.state = before;
                return Ok(false);
            }
            Err(error) => {
                let dest = self.staged.dest_path().to_owned();
                return Err(SnapshotError::reflink_failed(dest, error));
            }
        }
        self.stale_pages = None;
        self.pages.begin_full();
        // The image has replaced all pages of the RAM that were written.
        self.written.clear();
        if self.check == EpochCheck::Made {
            self.check = EpochCheck::Undone;
        }
        self.state = State::Complete;
        Ok(true)
    }

    /// Writes the pages of a full dump that may hold nonzero bytes, while it finds them.
    fn write_nonzero<R: PageReader + ?Sized>(
        &mut self,
        reader: &Touched<'_, R>,
    ) -> Result<(), SnapshotError> {
        let Geometry {
            ram_size,
            page_size,
        } = self.geometry;
        let progress = self.report_start(ram_size, Pass::Full)?;
        let runs = NonzeroRuns::new(reader, ram_size, page_size)
            .find_zeros(self.skip.zeros)
            .on_skip(|bytes| progress.skipped(bytes));
        self.write_found(reader, &progress, runs).map(drop)
    }

    /// Writes runs of pages that are found during the write, and that an earlier write may have
    /// written. Returns the number of bytes written.
    pub(super) fn write_found<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        progress: &WriteProgress,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<u64, SnapshotError> {
        let stale_pages = &mut self.stale_pages;
        let start = self.layout.data_start(self.geometry.page_size);
        let runs = runs.inspect(|run| {
            if let Some(stale_pages) = stale_pages {
                stale_pages.remove(&(start + run.start..start + run.end));
            }
        });
        let pass = WritePass {
            file: self.staged.file(),
            options: &self.write,
            progress,
        };
        let written = match &mut self.pages {
            PageRecord::Footer(footer) => footer.write_found(&pass, reader, runs),
            PageRecord::Empty | PageRecord::Holes(_) | PageRecord::Caller | PageRecord::All => {
                pass.write_raw(reader, runs).map(Ok)
            }
        };
        match written {
            Ok(Err(source)) => Err(self.cannot_seal(source)),
            Ok(Ok(written)) => self.finish_pass(progress, Ok(written)),
            Err(error) => self.finish_pass(progress, Err(error)),
        }
    }
}
