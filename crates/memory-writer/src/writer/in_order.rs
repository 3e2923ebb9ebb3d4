//! Writes of pages in an order that the caller decides while they are written.

use std::cell::RefCell;
use std::ops::Range;

use dirty_bitmap::{Coverage, DirtyBitmap, PageSet};
use page_reader::PageReader;
use sparse_file::Pass;

use super::{MemoryWriter, State};
use crate::error::SnapshotError;
use crate::geometry::{Geometry, check_bitmap_start, reader_start};
use crate::page_record::PageRecord;
use crate::reader_source::{check_source, name_cause};
use crate::stale_pages::StalePages;

/// A run of pages of [`MemoryWriter::write_full_in_order`]: a range of bytes of the RAM, of whole
/// pages of the memory file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(
    clippy::exhaustive_enums,
    reason = "a page is read, or known to be zeros"
)]
pub enum PageRun {
    /// Pages that are read.
    Data(Range<u64>),
    /// Pages of zeros, which are not read. They become holes, or are listed as zeros.
    Zeros(Range<u64>),
}

impl MemoryWriter {
    /// Checks what [`write_full`](Self::write_full) and the release of an epoch of the bitmap
    /// `dirty` check before anything is written. Use it where preparations come before the write.
    ///
    /// # Errors
    /// Returns the error that the write would return. The writer is unchanged.
    pub fn preflight_full<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(dirty)?;
        check_bitmap_start(dirty.ram_start(), reader_start(reader))?;
        self.check_full()?;
        self.check_layout(reader)
    }

    /// Checks what [`write_diff_in_order`](Self::write_diff_in_order) checks before anything is
    /// written, except for what depends on which pages are marked. Use it where preparations come
    /// before the write.
    ///
    /// # Errors
    /// Returns the error that the write would return. The writer is unchanged.
    pub fn preflight_diff<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(dirty)?;
        self.check_marks(dirty)?;
        let raw_parent = self.raw_parent_of(dirty);
        self.check_raw_replaced(raw_parent)?;
        check_bitmap_start(dirty.ram_start(), reader_start(reader))?;
        self.check_parent()?;
        self.check_layout(reader)?;
        if self.state != State::Empty {
            return Err(SnapshotError::WrittenBefore {
                dest: self.staged.dest_path().to_owned(),
            });
        }
        self.check_raw_diff_has_name()
    }

    /// Writes all of the RAM in the order of `runs`, which must return each page once.
    ///
    /// `runs` is asked for the next run while earlier ones are written, so the caller can decide
    /// the order by what happens meanwhile. [`read_at`](PageReader::read_at) is called once for
    /// each byte of a [data](PageRun::Data) run, in the order of the runs, and by this thread only.
    /// The memory that the reader [exposes](PageReader::host_memory) is not used.
    ///
    /// # Errors
    /// - The errors of [`write_full`](Self::write_full).
    /// - [`SnapshotError::Run`] for a run that is empty, is not of whole pages, ends past the RAM
    ///   or has a page of an earlier run, and [`SnapshotError::MissingPages`] if pages are missing
    ///   when `runs` has ended: the writer can no longer be committed.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::{Layout, MemoryWriter, PageRun};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("full.mem");
    /// let ram = vec![7; 1 << 20];
    /// let mut writer = MemoryWriter::options()
    ///     .layout(Layout::Packed)
    ///     .open(&dest, 1 << 20, 4096)?;
    /// let (first, second) = (0..512 << 10, 512 << 10..1 << 20);
    /// writer.write_full_in_order(&ram, [PageRun::Data(second), PageRun::Data(first)])?;
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_full_in_order<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        runs: impl IntoIterator<Item = PageRun>,
    ) -> Result<(), SnapshotError> {
        self.check_full()?;
        self.check_layout(reader)?;
        self.set_layout(reader);
        let written_before = self.state != State::Empty;
        self.begin()?;
        let began = Coverage::begin_full();
        self.pages.begin_full();
        if written_before {
            // Zeros are not written, so bytes of an earlier write must be wiped.
            self.stale_pages = StalePages::of_new_writes(self.layout, self.geometry);
        }
        let ram_size = self.geometry.ram_size;
        let all = std::iter::once(0..ram_size);
        self.write_in_order(reader, all, Pass::Full, runs.into_iter())?;
        self.reader_start = reader_start(reader);
        self.written.add_full(began);
        self.state = State::Complete;
        Ok(())
    }

    /// Writes the pages that `dirty` marks in the order of `runs`, which must return each of these
    /// pages once. Returns the number of pages of the memory file that were written.
    ///
    /// Calls `runs` and `reader` as [`write_full_in_order`](Self::write_full_in_order) does. The
    /// marks are widened to whole pages of the memory file. The writer must not have written any
    /// page before.
    ///
    /// # Errors
    /// - The errors of [`write_diff`](Self::write_diff): nothing was written, and the writer is
    ///   unchanged.
    /// - [`SnapshotError::WrittenBefore`] if the writer has written pages: nothing was written.
    /// - [`SnapshotError::Run`] for a run that is empty, has pages that `dirty` does not mark, or
    ///   pages of an earlier run, and [`SnapshotError::MissingPages`]: the writer can no longer be
    ///   committed.
    pub fn write_diff_in_order<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<u64, SnapshotError> {
        self.preflight_diff(reader, dirty)?;
        let plan = self.plan(dirty.runs())?;
        self.check_raw_diff(&plan)?;
        drop(plan);
        self.set_ram_start(dirty.ram_start());
        self.set_layout(reader);
        self.begin()?;
        let runs = runs.into_iter().map(PageRun::Data);
        let written = self.write_in_order(reader, dirty.runs(), Pass::Pages, runs)?;
        self.written.add_diff(dirty);
        self.raw_parent = self.raw_parent_of(dirty).or(self.raw_parent);
        self.state = State::Complete;
        Ok(written / self.geometry.page_size)
    }

    /// Counts the pages that `dirty` marks as written, for [`check_epoch`](Self::check_epoch): the
    /// caller has written each of them after its mark was taken, some by
    /// [`write_runs`](Self::write_runs), which does not count by itself.
    ///
    /// Nothing else checks this promise. If a page was not written, the release of its epoch loses
    /// it.
    ///
    /// # Errors
    /// Returns [`SnapshotError::BitmapSize`] or [`SnapshotError::BitmapStart`] if the bitmap covers
    /// other RAM, and [`SnapshotError::NothingWritten`].
    pub fn count_as_written(
        &mut self,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<(), SnapshotError> {
        self.check_bitmap(dirty)?;
        match self.state {
            State::Empty => Err(SnapshotError::NothingWritten {
                dest: self.staged.dest_path().to_owned(),
            }),
            State::Incomplete => Err(self.incomplete()),
            State::Complete => {
                self.check_marks(dirty)?;
                let raw_parent = self.raw_parent_of(dirty);
                self.check_raw_replaced(raw_parent)?;
                self.raw_parent = raw_parent.or(self.raw_parent);
                self.written.add_diff(dirty);
                Ok(())
            }
        }
    }

    /// Writes the `wanted` pages in the order of `runs`. Returns the number of bytes written.
    fn write_in_order<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        wanted: impl Iterator<Item = Range<u64>>,
        pass: Pass,
        runs: impl Iterator<Item = PageRun>,
    ) -> Result<u64, SnapshotError> {
        let missing = RefCell::new(Missing::new(self.geometry, wanted));
        let total = missing.borrow().bytes();
        let progress = self.report_start(total, pass)?;
        let reader = &Unexposed(reader);
        if let PageRecord::Holes(diff) = &mut self.pages {
            diff.add(&missing.borrow().pages);
        }
        let data = runs
            .map_while(|run| missing.borrow_mut().take(run))
            .filter_map(|run| match run {
                PageRun::Data(run) => Some(run),
                PageRun::Zeros(run) => {
                    // A cancellation is noticed at the next write, or at the end.
                    let _ = progress.skipped(run.end - run.start);
                    None
                }
            });
        let written = self.write_found(reader, &progress, data);
        let written = written.map_err(|error| name_cause(reader, error))?;
        missing.into_inner().check(self)?;
        check_source(reader, self.dest_path())?;
        Ok(written)
    }
}

/// The pages that a caller has yet to return.
struct Missing {
    pages: PageSet,
    geometry: Geometry,
    /// The first run that is invalid.
    invalid: Option<Range<u64>>,
}

impl Missing {
    fn new(geometry: Geometry, wanted: impl Iterator<Item = Range<u64>>) -> Self {
        let mut pages = geometry.no_pages();
        wanted.for_each(|run| pages.add(&run));
        Self {
            pages,
            geometry,
            invalid: None,
        }
    }

    fn bytes(&self) -> u64 {
        self.pages.page_count() * self.pages.page_size()
    }

    /// Removes a run. Returns `None` if it is invalid, which ends the write.
    fn take(&mut self, run: PageRun) -> Option<PageRun> {
        let (PageRun::Data(range) | PageRun::Zeros(range)) = &run;
        let unit = self.geometry.page_size;
        let whole = range.start.is_multiple_of(unit) && range.end.is_multiple_of(unit);
        let inside = range.start < range.end && range.end <= self.geometry.ram_size;
        let is_missing = || {
            self.pages
                .runs_in(range.clone())
                .eq(std::iter::once(range.clone()))
        };
        if !(whole && inside && is_missing()) {
            self.invalid = Some(range.clone());
            return None;
        }
        self.pages.remove(range);
        Some(run)
    }

    /// Checks that no run was invalid and no page is missing.
    fn check(self, writer: &MemoryWriter) -> Result<(), SnapshotError> {
        if let Some(Range { start, end }) = self.invalid {
            return Err(SnapshotError::Run {
                start,
                end,
                page_size: self.geometry.page_size,
                ram_size: self.geometry.ram_size,
            });
        }
        match self.pages.runs().next() {
            None => Ok(()),
            Some(first) => Err(SnapshotError::MissingPages {
                dest: writer.dest_path().to_owned(),
                first: first.start,
                bytes: self.bytes(),
            }),
        }
    }
}

/// A reader that does not expose its memory, so that each byte is read once.
struct Unexposed<'r, R: ?Sized>(&'r R);

impl<R: PageReader + ?Sized> PageReader for Unexposed<'_, R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn check_source(&self) -> std::io::Result<()> {
        self.0.check_source()
    }

    fn ram_layout(&self) -> Option<&page_reader::RamLayout> {
        self.0.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        self.0.known_size()
    }
}
