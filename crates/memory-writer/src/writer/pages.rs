//! Writes of some pages: diffs, runs and zeros.

use std::ops::Range;

use dirty_bitmap::{DirtyBitmap, whole_pages};
use page_reader::{PageReader, Touched};
use sparse_file::{Pass, SpaceError, check_len, punch_hole};

use super::{MemoryWriter, State};
use crate::error::SnapshotError;
use crate::geometry::{Geometry, check_bitmap_start, reader_start};
use crate::page_record::PageRecord;
use crate::reader_source::{check_source, name_cause};
use crate::stale_pages::Zeros;
use crate::write_pass::{Plan, WritePass};

/// A diff of at least 1 / `SKIP_FRACTION` of the RAM does not read pages that are known to be
/// untouched.
const SKIP_FRACTION: u64 = 64;

impl MemoryWriter {
    /// Writes the pages that `dirty` marks. Returns the number of pages of the memory file that
    /// were written.
    ///
    /// The bitmap may be of any kind and have any page size: its marks are widened to whole pages
    /// of the file. It is not changed: pass the bitmap of an [`Epoch`](dirty_bitmap::Epoch), and
    /// [commit and release](Self::commit_and_release) the epoch. A diff without a dirty page is a
    /// file of one hole and can be committed.
    ///
    /// Marked pages that are [known](page_reader::PageReader::populated) to be untouched are
    /// written as zeros without being read if at least 1/64 of the RAM is marked. Pass a
    /// [`Touched`] to get this in every case, for a guest that returns pages to the host (a
    /// balloon) after it wrote them.
    ///
    /// Only the holes of the file record which pages a raw diff holds. Where holes are not
    /// reliable, the diff is refused before anything is written: see
    /// [`allow_ambiguous_diff`](crate::MemoryWriterOptions::allow_ambiguous_diff).
    /// Before the commit, the holes of the file are compared with what was written. After
    /// [`write_full`](Self::write_full) the file is a full image that holds every page, and is not
    /// checked.
    ///
    /// # Errors
    /// Nothing was written and the writer is unchanged after:
    ///
    /// - [`SnapshotError::BitmapSize`] or [`SnapshotError::BitmapStart`] if the bitmap covers other
    ///   RAM.
    /// - [`SnapshotError::Regions`] if the reader has other regions than a sealed diff would
    ///   record, and [`SnapshotError::ReaderSize`] if its RAM has another size.
    /// - [`SnapshotError::AmbiguousDiff`] if a raw diff could not be read back.
    /// - [`SnapshotError::DiffWithoutParent`] for a sealed diff that no chain accepts.
    /// - [`SnapshotError::StaleParent`] for a sealed diff whose parent is not the image that the
    ///   [marks build on](DirtyBitmap::parent). [`SnapshotError::RawParent`] if it names a raw
    ///   image and the marks build on one with an id, and [`SnapshotError::ParentNotRaw`] in the
    ///   reverse case.
    /// - [`SnapshotError::ReplacesParent`] for a raw diff whose destination is the image that the
    ///   marks build on, or one that its seal names. A raw image is not recognized.
    /// - [`SnapshotError::Seal`] for more runs than a footer can list.
    /// - [`SnapshotError::MemoryIo`] of the step [`SetSize`](crate::MemoryIoStep::SetSize) if the
    ///   pages of a packed file end past `RLIMIT_FSIZE`.
    ///
    /// The writer can no longer be committed after another [`SnapshotError::MemoryIo`] or
    /// [`SnapshotError::Cancelled`].
    pub fn write_diff<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<u64, SnapshotError> {
        self.check_bitmap(dirty)?;
        self.check_marks(dirty)?;
        let raw_parent = self.raw_parent_of(dirty);
        self.check_raw_replaced(raw_parent)?;
        check_bitmap_start(dirty.ram_start(), reader_start(reader))?;
        let ram = dirty.ram_start();
        let pages = self.write_pages(reader, dirty.runs(), Some(ram), Pass::Pages)?;
        self.written.add_diff(dirty);
        self.raw_parent = raw_parent.or(self.raw_parent);
        Ok(pages)
    }

    /// Writes the pages that overlap the given runs of bytes. Returns the number of pages of the
    /// memory file that were written. Like [`write_diff`](Self::write_diff), for callers that know
    /// runs and need no bitmap of all the RAM.
    ///
    /// `runs` is called more than once and returns the same runs each time: ranges of bytes of the
    /// RAM that ascend and do not overlap. Does not count as a write of any mark of an epoch.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Run`] for a run that is empty, ends past the RAM or begins before
    /// the previous run ended: nothing was written and the writer is unchanged. Otherwise as
    /// `write_diff`.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::{Layout, MemoryWriter, Seal};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("diff.mem");
    /// let ram = vec![7; 1 << 20];
    /// let mut writer = MemoryWriter::options()
    ///     .layout(Layout::Packed)
    ///     .seal(Seal::new().on_raw_image())
    ///     .open(&dest, 1 << 20, 4096)?;
    /// writer.write_zeros(|| [65536..131072].into_iter())?;
    /// assert_eq!(writer.write_runs(&ram, || [0..4096, 8192..8193].into_iter())?, 2);
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_runs<R: PageReader + ?Sized, I: Iterator<Item = Range<u64>>>(
        &mut self,
        reader: &R,
        runs: impl Fn() -> I,
    ) -> Result<u64, SnapshotError> {
        self.geometry.check_runs(runs(), 1)?;
        self.check_raw_replaced(self.raw_parent)?;
        self.write_pages(reader, runs(), None, Pass::Pages)
    }

    /// Records pages as zeros without reading them. The pages take no space in the footer of a
    /// sealed or packed diff, and become holes in a raw file that holds all of the RAM. In a raw
    /// diff, whose holes are clean pages, zeros are written.
    ///
    /// `runs` is called more than once and returns the same runs each time: ranges of bytes of the
    /// RAM that ascend, do not overlap and consist of whole pages of the memory file. Uses 16 bytes
    /// of memory a run.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Run`] for a run that is empty, is not of whole pages, ends past the
    /// RAM or begins before the previous run ended. Otherwise as [`write_diff`](Self::write_diff).
    pub fn write_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        self.geometry.check_runs(runs(), self.geometry.page_size)?;
        match &self.pages {
            PageRecord::Footer(_) => self.list_zeros(&runs),
            PageRecord::All => self.punch_zeros(&runs),
            PageRecord::Empty | PageRecord::Holes(_) | PageRecord::Caller => {
                self.check_raw_replaced(self.raw_parent)?;
                let written = self.write_pages(&Zeros, runs(), None, Pass::Zeros);
                written.map(drop)
            }
        }
    }

    /// Lists runs of zeros in the footer. Overwrites pages that are already in the file with zeros.
    fn list_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        self.check_parent()?;
        self.check_room(runs().count() as u64)?;
        let placed = self.pages.footer().map_or_else(Vec::new, |footer| {
            let placed = runs().flat_map(|run| footer.placed(run));
            placed.collect()
        });
        match placed.is_empty() {
            true => self.begin()?,
            false => _ = self.write_pages(&Zeros, placed.into_iter(), None, Pass::Zeros)?,
        }
        if let PageRecord::Footer(footer) = &mut self.pages {
            footer.add_zeros(runs());
        }
        self.state = State::Complete;
        Ok(())
    }

    /// Punches holes in a raw file that holds all of the RAM, or writes zeros where the file system
    /// has no holes.
    fn punch_zeros<I: Iterator<Item = Range<u64>>>(
        &mut self,
        runs: &impl Fn() -> I,
    ) -> Result<(), SnapshotError> {
        self.begin()?;
        for run in runs() {
            match punch_hole(self.staged.file(), run.clone()) {
                Ok(()) => {}
                Err(SpaceError::Unsupported { .. }) => {
                    self.state = State::Complete;
                    return self
                        .write_pages(&Zeros, runs(), None, Pass::Zeros)
                        .map(drop);
                }
                Err(error) => {
                    let dest = self.staged.dest_path().to_owned();
                    return Err(SnapshotError::punch_failed(dest, run.start, error));
                }
            }
        }
        self.state = State::Complete;
        Ok(())
    }

    /// Writes the pages of the memory file that overlap `runs`. `ram` is the guest-physical start
    /// address of the RAM, if a bitmap provides it. Returns the number of pages written.
    fn write_pages<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
        ram: Option<u64>,
        pass: Pass,
    ) -> Result<u64, SnapshotError> {
        let Geometry {
            ram_size,
            page_size,
        } = self.geometry;
        self.check_parent()?;
        self.check_layout(reader)?;
        let plan = self.plan(whole_pages(runs, page_size))?;
        self.check_raw_diff(&plan)?;
        if let Some(ram) = ram {
            self.set_ram_start(ram);
        }
        self.set_layout(reader);
        self.begin()?;
        // Marked pages were written, so they are populated. Many marks may mean that all of the RAM
        // is marked, touched or not: then the query takes less time than the writes it saves.
        let reader = &if self.read_untouched {
            Touched::unknown(reader, ram_size).faults_in(false)
        } else if plan.len() >= ram_size / SKIP_FRACTION {
            Touched::new(reader, ram_size)
        } else {
            Touched::unknown(reader, ram_size)
        };
        let written = self.write_plan(reader, plan, pass);
        let written = written.map_err(|error| name_cause(reader, error))?;
        check_source(reader, self.dest_path())?;
        self.state = State::Complete;
        Ok(written / page_size)
    }

    /// Finds the pages to write and their place in the file. Writes nothing.
    pub(super) fn plan(
        &self,
        pages: impl Iterator<Item = Range<u64>>,
    ) -> Result<Plan, SnapshotError> {
        let mut set = self.geometry.no_pages();
        pages.for_each(|run| set.add(&run));
        match self.pages.footer() {
            Some(footer) => {
                let plan = footer.plan(&set);
                let plan = plan.map_err(|source| self.cannot_seal(source))?;
                // The limit of this process is known before the first page is written.
                let (file, end) = (self.staged.file(), plan.file_end());
                check_len(file, end).map_err(|error| {
                    SnapshotError::set_size_failed(self.staged.dest_path().to_owned(), end, error)
                })?;
                Ok(Plan::Placed(plan))
            }
            None => Ok(Plan::Raw(set)),
        }
    }

    /// Writes the pages of a plan. Returns the number of bytes written.
    pub(super) fn write_plan<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        plan: Plan,
        pass: Pass,
    ) -> Result<u64, SnapshotError> {
        let progress = self.report_start(plan.len(), pass)?;
        if let Some(stale_pages) = &mut self.stale_pages {
            match &plan {
                Plan::Raw(pages) => stale_pages.remove_pages(pages),
                Plan::Placed(plan) => {
                    let extents = plan.extents().iter();
                    extents.for_each(|extent| stale_pages.remove(&extent.file_range()));
                }
            }
        }
        let pass = WritePass {
            file: self.staged.file(),
            options: &self.write,
            progress: &progress,
        };
        let written = match (plan, &mut self.pages) {
            (Plan::Placed(plan), PageRecord::Footer(footer)) => {
                footer.write_plan(&pass, reader, plan)
            }
            (Plan::Raw(pages), record) => {
                if let PageRecord::Holes(diff) = record {
                    diff.add(&pages);
                }
                pass.write_raw(reader, pages.runs())
            }
            (Plan::Placed(_), _) => unreachable!("only a footer places pages"),
        };
        self.finish_pass(&progress, written)
    }
}
