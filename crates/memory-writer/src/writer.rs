//! The writer of a snapshot: its state.

mod checks;
mod commit;
mod full;
mod in_order;
mod open;
mod pages;

pub use in_order::PageRun;

use std::path::Path;

use atomic_file::NotPreserved;
use dirty_bitmap::Coverage;
use image_format::{ImageId, Layout};
use sparse_file::{EngineChoice, Pass, Progress, WriteError, WriteOptions};

use crate::error::SnapshotError;
use crate::geometry::Geometry;
use crate::options::{MemoryWriterOptions, Skip};
use crate::page_record::PageRecord;
use crate::progress::{Reporter, WriteProgress};
use crate::sealing::FooterBuilder;
use crate::stale_pages::StalePages;
use crate::target::Target;

/// A memory snapshot that is staged beside its destination until [`commit`](Self::commit) replaces
/// the destination.
///
/// Dropping the writer without a commit removes the staged file and leaves the destination
/// unchanged.
///
/// `write_full` and `write_diff` may be called in any order and as often as needed; the last write
/// of a page counts. A write that fails, panics or is cancelled leaves a file that lacks pages, so
/// the writer then refuses to commit.
///
/// The type is `Send`: one thread may open a writer, another one write, and a third one commit.
#[derive(Debug)]
#[must_use = "a writer that is dropped leaves no snapshot"]
pub struct MemoryWriter {
    staged: Target,
    geometry: Geometry,
    layout: Layout,
    ram_start: Option<u64>,
    /// The first address of the RAM that a reader of a full dump states.
    reader_start: Option<u64>,
    write: WriteOptions,
    skip: Skip,
    read_untouched: bool,
    reporter: Reporter,
    state: State,
    /// Whether the destination must not be an image that a diff needs.
    keeps_parent: bool,
    /// The image that the marks in a raw file build on, if it is known. A full image needs none.
    raw_parent: Option<ImageId>,
    /// The images that the seal of a raw file names. A full image needs none.
    raw_needed: Vec<ImageId>,
    /// Bytes that are wiped before the commit: in a recycled file, and where a full dump skipped
    /// pages that an earlier write had written.
    stale_pages: Option<StalePages>,
    pages: PageRecord,
    /// The marks of epochs whose pages were written.
    written: Coverage,
    check: EpochCheck,
}

/// Whether the pages of an epoch were checked to be written, so that its marks may be released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EpochCheck {
    None,
    Made,
    /// Other bytes have replaced the pages since the check.
    Undone,
}

/// Completeness of the staged file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Empty,
    /// A write is under way, or has failed, panicked or been cancelled.
    Incomplete,
    Complete,
}

impl MemoryWriter {
    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes with the default
    /// [`MemoryWriterOptions`]. The file replaces or creates `dest` when it is committed.
    ///
    /// `page_size` is a power of two: 16 KiB on Apple silicon and 4 KiB on most other hosts.
    /// `ram_size` is a multiple of it.
    ///
    /// # Errors
    /// - [`SnapshotError::Ram`] if a size is invalid.
    /// - [`SnapshotError::Open`] if the file cannot be staged.
    /// - [`SnapshotError::MemoryIo`] if the staged file cannot get its size.
    /// - [`SnapshotError::Seal`] if regions or metadata do not fit the footer.
    ///
    /// No file is left behind.
    pub fn open(
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<Self, SnapshotError> {
        Self::options().open(dest, ram_size, page_size)
    }

    /// Returns a builder for durability, mode, progress, cancellation and other options.
    pub fn options() -> MemoryWriterOptions {
        MemoryWriterOptions::new()
    }

    /// Returns the size of the memory file in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.geometry.ram_size
    }

    /// Returns the size of a page of the memory file in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.geometry.page_size
    }

    /// Returns whether [`MemoryWriterOptions::skip_zeros`] is set.
    #[must_use]
    pub fn skips_zeros(&self) -> bool {
        self.skip.zeros
    }

    /// Calls the [progress](MemoryWriterOptions::progress) function. Use this for work between the
    /// writes, such as a search for zeros.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Cancelled`] if the function or the
    /// [token](MemoryWriterOptions::cancel) cancels. The writer is unchanged.
    pub fn report(&self, progress: Progress) -> Result<(), SnapshotError> {
        match self.reporter.report(progress).is_break() {
            true => Err(self.cancelled(0)),
            false => Ok(()),
        }
    }

    /// Returns the path that the commit replaces or creates, or a description of an [open
    /// file](MemoryWriterOptions::open_file).
    #[must_use]
    pub fn dest_path(&self) -> &Path {
        self.staged.dest_path()
    }

    /// Returns the path of the staged file, or a description of an [open
    /// file](MemoryWriterOptions::open_file).
    #[must_use]
    pub fn staged_path(&self) -> &Path {
        self.staged.staged_path()
    }

    /// Returns whether the staged file is an older snapshot that [`MemoryWriterOptions::recycle`]
    /// reuses.
    #[must_use]
    pub fn recycled(&self) -> bool {
        self.staged.recycled()
    }

    /// Returns the I/O engine that a full dump by this writer uses, and why no faster one does. See
    /// [`WriteOptions::engine_choice`].
    ///
    /// # Examples
    /// ```
    /// use memory_writer::MemoryWriter;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let writer = MemoryWriter::open(dir.path().join("full.mem"), 1 << 30, 4096)?;
    /// let choice = writer.engine_choice();
    /// if choice.is_fallback() {
    ///     println!("a faster engine is not available: {choice}");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn engine_choice(&self) -> EngineChoice {
        let ram_size = self.geometry.ram_size;
        self.write.engine_choice(self.staged.file(), ram_size)
    }

    /// Returns the id of the snapshot, or `None` for a raw one. A diff on top of the snapshot names
    /// the id as its parent.
    #[must_use]
    pub fn image_id(&self) -> Option<ImageId> {
        self.pages.footer().map(FooterBuilder::id)
    }

    /// Stores `bytes` with the snapshot and replaces [`Seal::metadata`](crate::Seal::metadata). Use
    /// it for the state of the vCPUs, which is known once they are paused.
    ///
    /// # Errors
    /// - [`SnapshotError::NotSealed`]: a raw file cannot hold metadata.
    /// - [`SnapshotError::Seal`] for more than 16 MiB.
    ///
    /// The writer is unchanged after either error.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        let PageRecord::Footer(footer) = &mut self.pages else {
            return Err(SnapshotError::NotSealed { dest: dest() });
        };
        let set = footer.set_metadata(bytes.into());
        set.map_err(|source| SnapshotError::Seal {
            dest: dest(),
            source,
        })
    }

    /// Reports the start of a write of `total` bytes.
    fn report_start(&self, total: u64, pass: Pass) -> Result<WriteProgress, SnapshotError> {
        let progress = self.reporter.begin(total, pass);
        match progress.wrote(0).is_break() {
            true => Err(self.cancelled(0)),
            false => Ok(progress),
        }
    }

    /// Returns the number of bytes that a write has written, or the reason why it is not complete.
    fn finish_pass(
        &self,
        progress: &WriteProgress,
        written: Result<u64, WriteError>,
    ) -> Result<u64, SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        let written = written.map_err(|error| SnapshotError::write_failed(dest(), error))?;
        match progress.is_cancelled() {
            true => Err(self.cancelled(written)),
            false => Ok(written),
        }
    }

    fn cancelled(&self, written: u64) -> SnapshotError {
        SnapshotError::Cancelled {
            dest: self.staged.dest_path().to_owned(),
            written,
        }
    }

    /// Returns the attributes of the replaced file that the snapshot will not get; see
    /// [`atomic_file::AtomicWriter::not_preserved`].
    #[must_use]
    pub fn not_preserved(&self) -> &[NotPreserved] {
        self.staged.not_preserved()
    }

    /// Marks the writer as incomplete until the write that begins has succeeded.
    fn begin(&mut self) -> Result<(), SnapshotError> {
        if self.state == State::Incomplete {
            return Err(self.incomplete());
        }
        self.state = State::Incomplete;
        Ok(())
    }

    fn incomplete(&self) -> SnapshotError {
        SnapshotError::Incomplete {
            dest: self.staged.dest_path().to_owned(),
        }
    }
}
