//! Open, write, commit.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use atomic_file::AtomicWriter;
use dirty_bitmap::DirtyBitmap;
use page_reader::PageReader;
use sparse_file::{SpaceError, WriteOptions, grow, write_runs};

use crate::error::{RamError, SnapshotError};
use crate::guest::Guest;
use crate::meter::Meter;
use crate::needed::{Needed, Skip};
use crate::options::{Options, Watch};
use crate::pages::WholePages;
use crate::unwritten::Unwritten;

/// A memory snapshot under way: staged beside its destination until [`commit`](Self::commit) puts it there.
///
/// Dropped without a commit, it leaves the destination as it was and nothing behind.
///
/// `write_full` and `write_diff` may be called in any order and as often as needed; the last write of a page counts. A write that
/// fails, panics or is cancelled leaves a file that lacks pages, so the writer then refuses to commit.
#[derive(Debug)]
#[must_use = "a writer that is dropped leaves no snapshot"]
pub struct MemoryWriter {
    stage: AtomicWriter,
    ram_size: u64,
    page_size: u64,
    ram_start: Option<u64>,
    write: WriteOptions,
    skip: Skip,
    watch: Watch,
    state: State,
    /// What is to be wiped before the file is committed: in a recycled stage, and where a full dump left out what had been written.
    unwritten: Option<Unwritten>,
}

/// What the staged file is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// A write has begun and not succeeded: it is under way, or it failed, panicked or was cancelled.
    Incomplete,
    Whole,
}

impl MemoryWriter {
    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes, to replace `dest` or become it, with the
    /// default [`Options`].
    ///
    /// `page_size` is a power of two, 16 KiB on Apple Silicon and 4 KiB on most other hosts; `ram_size` is a multiple of it.
    ///
    /// # Errors
    /// [`SnapshotError::Ram`] for sizes that no memory file has, [`SnapshotError::Open`] where nothing can be staged,
    /// [`SnapshotError::MemoryIo`] where the file can't be that large. Nothing is left behind.
    pub fn open(
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<Self, SnapshotError> {
        Self::options().open(dest, ram_size, page_size)
    }

    /// Durability, mode, progress, cancellation and whatever else is not the default.
    pub fn options() -> Options {
        Options::new()
    }

    pub(crate) fn open_with(
        dest: &Path,
        ram_size: u64,
        page_size: u64,
        options: Options,
    ) -> Result<Self, SnapshotError> {
        check_ram(ram_size, page_size)?;
        let stage = options.stage(dest)?;
        resize(stage.file(), ram_size).map_err(|error| {
            SnapshotError::from_grow(stage.dest_path().to_owned(), ram_size, error)
        })?;
        let unwritten = stage
            .recycled()
            .then(|| Unwritten::all(ram_size, page_size));
        let Options {
            write,
            skip,
            ram_start,
            watch,
            ..
        } = options;
        Ok(Self {
            stage,
            ram_size,
            page_size,
            ram_start,
            write,
            skip,
            watch,
            state: State::Empty,
            unwritten,
        })
    }

    /// The size of the memory file in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// The page of the memory file in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Where the snapshot will be.
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        self.stage.dest_path()
    }

    /// Where it is staged.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        self.stage.temp_path()
    }

    /// Whether the staged file is an older snapshot's, on request of [`Options::recycle`].
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.stage.recycled()
    }

    /// Writes all of the RAM, every byte of `[0, ram_size)`, zeros too unless [`Options::skip_zeros`] or
    /// [`Options::skip_untouched`] leave them out.
    ///
    /// # Errors
    /// [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]; the writer can't be committed then.
    pub fn write_full<R: PageReader + ?Sized>(&mut self, reader: &R) -> Result<(), SnapshotError> {
        let written_before = self.state != State::Empty;
        self.begin()?;
        let (stage, write, skip) = (&self.stage, &self.write, self.skip);
        let meter = Meter::new(&mut self.watch, self.page_size, self.ram_size);
        if skip.anything() {
            if written_before {
                // Where this leaves out zeros, nothing may be left of that.
                self.unwritten = Some(Unwritten::all(self.ram_size, self.page_size));
            }
            let needed = Needed::new(reader, skip, self.ram_size, self.page_size, &meter);
            write_pages(stage, write, &mut self.unwritten, reader, needed, &meter)?;
        } else {
            let all = std::iter::once(0..self.ram_size);
            write_pages(stage, write, &mut self.unwritten, reader, all, &meter)?;
        }
        self.state = State::Whole;
        Ok(())
    }

    /// Writes the pages that `dirty` has marks in, and returns how many pages of the memory file that were.
    ///
    /// The bitmap may have any page size: what it marks is widened to whole pages of the file. It stays as it is:
    /// give an [`Epoch`](dirty_bitmap::Epoch)'s bitmap, and release the epoch once [`commit`](Self::commit) has returned.
    /// A diff without any dirty page is a file of one hole, and can be committed.
    ///
    /// # Errors
    /// [`SnapshotError::BitmapSize`] or [`SnapshotError::BitmapStart`] where the bitmap is of another RAM: nothing was
    /// written, and the writer stays as it was. [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]; the writer can't be committed then.
    pub fn write_diff<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        dirty: &DirtyBitmap,
    ) -> Result<u64, SnapshotError> {
        if dirty.ram_size() != self.ram_size {
            return Err(SnapshotError::BitmapSize {
                bitmap: dirty.ram_size(),
                file: self.ram_size,
            });
        }
        let ram = *self.ram_start.get_or_insert(dirty.ram_start());
        if dirty.ram_start() != ram {
            return Err(SnapshotError::BitmapStart {
                bitmap: dirty.ram_start(),
                ram,
            });
        }
        self.begin()?;
        let (stage, write) = (&self.stage, &self.write);
        let pages = || WholePages::new(dirty.runs(), self.page_size);
        let total = pages().map(|run| run.end - run.start).sum();
        let meter = Meter::new(&mut self.watch, self.page_size, total);
        let written = write_pages(stage, write, &mut self.unwritten, reader, pages(), &meter)?;
        self.state = State::Whole;
        Ok(written / self.page_size)
    }

    /// Whatever ends the write from here on but its success leaves the writer incomplete.
    fn begin(&mut self) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Err(self.incomplete());
        }
        self.state = State::Incomplete;
        Ok(())
    }

    /// Syncs the file, puts it at its destination, and syncs the directory: once this has returned, the snapshot is there after a power loss
    /// too (see [`Options::durability`]).
    ///
    /// # Errors
    /// [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`] and [`SnapshotError::MemoryIo`] (a recycled file could not
    /// be wiped): the destination is as it was.
    /// [`SnapshotError::Commit`] says which of old and new is there. Nothing is left behind but what the error names.
    pub fn commit(self) -> Result<(), SnapshotError> {
        Ok(self.finish()?.commit()?)
    }

    /// The staged file, whole and ready to be committed as part of an [`atomic_file::AtomicGroup`], beside the vCPUs' state, say.
    ///
    /// # Errors
    /// [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`] and [`SnapshotError::MemoryIo`] (a recycled file could not
    /// be wiped): the destination is as it was, and nothing is left behind.
    pub fn finish(self) -> Result<AtomicWriter, SnapshotError> {
        match self.state {
            State::Whole => {
                if let Some(unwritten) = &self.unwritten {
                    unwritten
                        .wipe(self.stage.file(), &self.write)
                        .map_err(|error| {
                            SnapshotError::from_wipe(self.stage.dest_path().to_owned(), error)
                        })?;
                }
                Ok(self.stage)
            }
            State::Incomplete => Err(self.incomplete()),
            State::Empty => Err(SnapshotError::NothingWritten {
                dest: self.stage.dest_path().to_owned(),
            }),
        }
    }

    fn incomplete(&self) -> SnapshotError {
        SnapshotError::Incomplete {
            dest: self.stage.dest_path().to_owned(),
        }
    }
}

fn write_pages<R: PageReader + ?Sized>(
    stage: &AtomicWriter,
    options: &WriteOptions,
    unwritten: &mut Option<Unwritten>,
    reader: &R,
    runs: impl Iterator<Item = Range<u64>>,
    meter: &Meter<'_>,
) -> Result<u64, SnapshotError> {
    let dest = || stage.dest_path().to_owned();
    let cancelled = |written| SnapshotError::Cancelled {
        dest: dest(),
        written,
    };
    if meter.wrote(0).is_break() {
        return Err(cancelled(0));
    }
    let runs = runs.inspect(|run| {
        if let Some(unwritten) = unwritten {
            unwritten.remove(run);
        }
    });
    let (file, source) = (stage.file(), Guest(reader));
    let written = write_runs(file, runs, &source, options, &mut |bytes| {
        meter.wrote(bytes)
    })
    .map_err(|error| SnapshotError::from_write(dest(), error))?;
    if meter.cancelled() {
        return Err(cancelled(written));
    }
    Ok(written)
}

/// A new file is grown; a recycled one may be longer.
fn resize(file: &File, len: u64) -> Result<(), SpaceError> {
    let shrink = || {
        if file.metadata()?.len() > len {
            file.set_len(len)?;
        }
        Ok(())
    };
    shrink().map_err(|source| SpaceError::Io {
        operation: "shrink the file",
        range: 0..len,
        source,
    })?;
    grow(file, len)
}

fn check_ram(ram_size: u64, page_size: u64) -> Result<(), RamError> {
    if ram_size == 0 {
        return Err(RamError::NoRam);
    }
    if i64::try_from(ram_size).is_err() {
        return Err(RamError::TooLarge { ram_size });
    }
    if !page_size.is_power_of_two() {
        return Err(RamError::PageSizeNotPowerOfTwo { page_size });
    }
    if page_size > ram_size {
        return Err(RamError::PageLargerThanRam {
            page_size,
            ram_size,
        });
    }
    if !ram_size.is_multiple_of(page_size) {
        return Err(RamError::NotWholePages {
            ram_size,
            page_size,
        });
    }
    Ok(())
}
