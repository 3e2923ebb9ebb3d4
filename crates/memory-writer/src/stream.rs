//! Packed images written to streams.

mod options;
mod send;

use std::fmt;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use dirty_bitmap::{Coverage, DirtyBitmap, Epoch, ParentImage, ReleaseError, whole_pages};
use image_format::{FooterError, ImageId};
use page_reader::{NonzeroRuns, PageReader, Touched};
use sparse_file::Pass;

pub use options::PackedStreamOptions;

use crate::error::{MemoryIoStep, SnapshotError};
use crate::geometry::{Geometry, reader_start};
use crate::options::Skip;
use crate::progress::{Reporter, WriteProgress};
use crate::sealing::FooterBuilder;

/// A packed image that is written to a stream: a pipe, a socket, a compressor or any other
/// [`Write`].
///
/// The bytes are those of the file that a [`MemoryWriter`](crate::MemoryWriter) of
/// [`Layout::Packed`](crate::Layout::Packed) writes for the same pages. The receiver stores them in
/// a file, or reads them from memory by `memory_image::Image::from_reader`. The header states the
/// length of the image, so a stream that is cut off is recognized as truncated.
///
/// The header comes first, so everything that it depends on is known before the first byte is
/// written. A stream takes one write, full or diff, and the [metadata](Self::set_metadata) before
/// it. A pre-copy dump, which writes pages more than once, needs a file.
///
/// Nothing is committed: [`finish`](Self::finish) writes the footer and flushes the stream. Whether
/// the bytes are durable is known to the receiver only.
///
/// The memory used does not depend on the number of pages, but for the footer: see
/// [`MemoryWriterOptions::layout`](crate::MemoryWriterOptions::layout). The stream is written in
/// pieces of up to 1 MiB.
///
/// # Examples
/// ```
/// use dirty_bitmap::DirtyBitmap;
/// use memory_writer::{PackedStream, Seal};
///
/// # let (ram, dirty) = (vec![0_u8; 1 << 20], DirtyBitmap::new(0, 1 << 20, 4096)?);
/// # let (mut socket, mut second) = (Vec::<u8>::new(), Vec::<u8>::new());
/// let mut stream = PackedStream::new(&mut socket, 1 << 20, 4096)?;
/// let parent = stream.image_id();
/// stream.write_full(&ram)?;
/// stream.finish()?;
///
/// dirty.mark(0x5000)?;
/// let epoch = dirty.begin_epoch()?; // restores the marks if it is dropped
/// let options = PackedStream::options().seal(Seal::new().parent(parent));
/// let mut stream = options.open(&mut second, 1 << 20, 4096)?;
/// stream.write_diff(&ram, epoch.bitmap())?;
/// stream.finish_and_release(epoch)?; // discards the marks if all bytes were accepted
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a stream that is not finished is a truncated image"]
pub struct PackedStream<W> {
    out: W,
    name: PathBuf,
    geometry: Geometry,
    ram_start: Option<u64>,
    /// The first address of the RAM that the reader of a full dump states.
    reader_start: Option<u64>,
    skip: Skip,
    read_untouched: bool,
    reporter: Reporter,
    state: State,
    footer: FooterBuilder,
    /// The marks of epochs whose pages were written.
    written: Coverage,
}

/// What the stream has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Nothing,
    /// The write is under way, or has failed, panicked or been cancelled.
    Part,
    /// The header and all pages.
    Pages,
}

impl PackedStream<io::Empty> {
    /// Returns a builder for the seal, progress, cancellation and other options. The stream is of
    /// the type that is passed to [`open`](PackedStreamOptions::open).
    pub fn options() -> PackedStreamOptions {
        PackedStreamOptions::new()
    }
}

impl<W: Write> PackedStream<W> {
    /// Begins an image of `ram_size` bytes of RAM in pages of `page_size` bytes with the default
    /// [`PackedStreamOptions`]. Writes nothing yet.
    ///
    /// `out` must be blocking. If a nonblocking one is full ([`io::ErrorKind::WouldBlock`]), the
    /// write fails with [`SnapshotError::MemoryIo`], the stream can no longer be finished, and the
    /// receiver has a truncated image. The marks of the epoch are kept.
    ///
    /// # Errors
    /// Returns the errors of [`PackedStreamOptions::open`].
    pub fn new(out: W, ram_size: u64, page_size: u64) -> Result<Self, SnapshotError> {
        PackedStreamOptions::new().open(out, ram_size, page_size)
    }

    /// Returns the id of the snapshot. A diff on top of the snapshot names the id as its parent.
    #[must_use]
    pub fn image_id(&self) -> ImageId {
        self.footer.id()
    }

    /// Stores `bytes` with the snapshot and replaces [`Seal::metadata`](crate::Seal::metadata). The
    /// header states the length of the metadata, so it must be set before the pages are written.
    ///
    /// # Errors
    /// Returns [`SnapshotError::StreamBegun`] after a write, and [`SnapshotError::Seal`] for more
    /// than 16 MiB. The stream is unchanged.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), SnapshotError> {
        if self.state != State::Nothing {
            return Err(self.begun());
        }
        let set = self.footer.set_metadata(bytes.into());
        set.map_err(|source| cannot_seal(&self.name, source))
    }

    /// Writes all of the RAM, except the pages that [options](PackedStreamOptions::skip_zeros)
    /// skip.
    ///
    /// With such an option the pages are found before the first one is written. A page of zeros
    /// that the guest writes after that is in the next diff, if its writes are tracked.
    ///
    /// # Errors
    /// Nothing was written after [`SnapshotError::FullWithParent`], [`SnapshotError::Regions`],
    /// [`SnapshotError::ReaderSize`], [`SnapshotError::StreamBegun`] and [`SnapshotError::Seal`].
    /// The stream can no longer be finished after [`SnapshotError::Seal`],
    /// [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`].
    pub fn write_full<R: PageReader + ?Sized>(&mut self, reader: &R) -> Result<(), SnapshotError> {
        self.footer.check_full(&self.name)?;
        self.footer.check_reader(reader, &self.name)?;
        self.geometry.check_reader(reader, &self.name)?;
        self.begin()?;
        let began = Coverage::begin_full();
        self.footer.set_regions_of(reader);
        self.footer.begin_full();
        let Geometry {
            ram_size,
            page_size,
        } = self.geometry;
        let reader = &match self.read_untouched && !self.skip.untouched {
            true => Touched::unknown(reader, ram_size).faults_in(false),
            false => Touched::new(reader, ram_size),
        };
        let progress = self.reporter.begin(ram_size, Pass::Full);
        self.check_cancelled(&progress)?;
        let placed = match self.skip.is_enabled() {
            false => self.footer.place(1, std::iter::once(0..ram_size)),
            true => {
                let runs = NonzeroRuns::new(reader, ram_size, page_size)
                    .find_zeros(self.skip.zeros)
                    .on_skip(|bytes| progress.skipped(bytes));
                // Cancellation ends the search.
                let found = runs.map_while(|run| progress.wrote(0).is_continue().then_some(run));
                self.footer.place(0, found)
            }
        };
        placed.map_err(|source| cannot_seal(&self.name, source))?;
        self.check_cancelled(&progress)?;
        self.send(reader, &progress)?;
        self.reader_start = reader_start(reader);
        self.written.add_full(began);
        Ok(())
    }

    /// Writes the pages that `dirty` marks, as
    /// [`MemoryWriter::write_diff`](crate::MemoryWriter::write_diff) does. Returns the number of
    /// pages written.
    ///
    /// # Errors
    /// Nothing was written and the stream is unchanged after [`SnapshotError::BitmapSize`],
    /// [`SnapshotError::BitmapStart`], [`SnapshotError::DiffWithoutParent`],
    /// [`SnapshotError::StaleParent`], [`SnapshotError::Regions`], [`SnapshotError::ReaderSize`],
    /// [`SnapshotError::StreamBegun`], and [`SnapshotError::Seal`] for
    /// more runs than a footer can list. The stream can no longer be finished after
    /// [`SnapshotError::MemoryIo`] or [`SnapshotError::Cancelled`]. The epoch then restores its
    /// marks when it is dropped.
    pub fn write_diff<R: PageReader + ?Sized>(
        &mut self,
        reader: &R,
        dirty: &DirtyBitmap<impl Sized>,
    ) -> Result<u64, SnapshotError> {
        self.geometry
            .check_bitmap(dirty, self.ram_start, reader_start(reader))?;
        self.footer.check_marks(dirty, &self.name)?;
        let pages = self.write_pages(reader, || dirty.runs(), Some(dirty.ram_start()))?;
        self.written.add_diff(dirty);
        Ok(pages)
    }

    /// Writes the pages that overlap the given runs of bytes, as
    /// [`MemoryWriter::write_runs`](crate::MemoryWriter::write_runs) does. Returns the number of
    /// pages written.
    ///
    /// `runs` is called more than once and returns the same runs each time: ranges of bytes of the
    /// RAM that ascend and do not overlap. Does not count as a write of any mark of an epoch.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Run`] for a run that is empty, ends past the RAM or begins before
    /// the previous run ended: nothing was written and the stream is unchanged. Otherwise as
    /// [`write_diff`](Self::write_diff).
    pub fn write_runs<R: PageReader + ?Sized, I: Iterator<Item = Range<u64>>>(
        &mut self,
        reader: &R,
        runs: impl Fn() -> I,
    ) -> Result<u64, SnapshotError> {
        self.geometry.check_runs(runs(), 1)?;
        self.write_pages(reader, runs, None)
    }

    fn write_pages<R: PageReader + ?Sized, I: Iterator<Item = Range<u64>>>(
        &mut self,
        reader: &R,
        runs: impl Fn() -> I,
        ram_start: Option<u64>,
    ) -> Result<u64, SnapshotError> {
        self.footer.check_parent(&self.name)?;
        self.footer.check_reader(reader, &self.name)?;
        self.geometry.check_reader(reader, &self.name)?;
        if self.state != State::Nothing {
            return Err(self.begun());
        }
        let pages = || whole_pages(runs(), self.geometry.page_size);
        let count = pages().count() as u64;
        self.footer
            .check_room(count)
            .map_err(|source| cannot_seal(&self.name, source))?;
        let placed = self.footer.place(count, pages());
        placed.map_err(|source| cannot_seal(&self.name, source))?;
        self.begin()?;
        if let Some(ram_start) = ram_start {
            self.set_ram_start(ram_start);
        }
        self.footer.set_regions_of(reader);
        let progress = self
            .reporter
            .begin(self.footer.present_bytes(), Pass::Pages);
        self.check_cancelled(&progress)?;
        let reader = Touched::unknown(reader, self.geometry.ram_size);
        let reader = reader.faults_in(!self.read_untouched);
        self.send(&reader, &progress)?;
        Ok(self.footer.present_bytes() / self.geometry.page_size)
    }

    /// Writes the footer, flushes the stream and returns it. The image is then complete.
    ///
    /// # Errors
    /// Returns [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`] if the write
    /// failed, [`SnapshotError::Seal`], and [`SnapshotError::MemoryIo`] if the stream cannot be
    /// written or flushed.
    pub fn finish(mut self) -> Result<W, SnapshotError> {
        match self.state {
            State::Pages => {}
            State::Part => return Err(SnapshotError::Incomplete { dest: self.name }),
            State::Nothing => return Err(SnapshotError::NothingWritten { dest: self.name }),
        }
        let offset = self.footer.data_end();
        let sealed = self.footer.write_to(&mut self.out);
        sealed.map_err(|source| match source {
            FooterError::Io { source, .. } => write_failed(&self.name, offset, source),
            source => cannot_seal(&self.name, source),
        })?;
        let flushed = self.out.flush();
        flushed.map_err(|source| write_failed(&self.name, offset, source))?;
        Ok(self.out)
    }

    /// Finishes as [`finish`](Self::finish) does, and then releases the epoch whose pages were
    /// written. On any error, the marks are restored to the bitmap.
    ///
    /// The marks are released once the stream has accepted all bytes, which may then be lost on
    /// their way. To wait for the receiver, call [`check_epoch`](Self::check_epoch), and finish and
    /// wait in [`Epoch::release_after`].
    ///
    /// # Errors
    /// Returns the errors of [`check_epoch`](Self::check_epoch) and [`finish`](Self::finish), and
    /// [`SnapshotError::EpochReclaimed`].
    pub fn finish_and_release<K, B: Deref<Target = DirtyBitmap<K>>>(
        mut self,
        mut epoch: Epoch<B, K>,
    ) -> Result<W, SnapshotError> {
        self.check_epoch(&mut epoch)?;
        let dest = self.name.clone();
        let released = epoch.release_after(|| self.finish());
        released.map_err(|error| match error {
            ReleaseError::Commit(error) => error,
            ReleaseError::Extended(_) => SnapshotError::EpochNotWritten { dest },
            ReleaseError::Reclaimed(source) => SnapshotError::EpochReclaimed { dest, source },
        })
    }

    /// Checks that every page whose mark `epoch` holds was written after the mark was taken, and
    /// sets the id of the image in the epoch, as
    /// [`MemoryWriter::check_epoch`](crate::MemoryWriter::check_epoch) does.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Incomplete`] if the write failed,
    /// [`SnapshotError::EpochNotWritten`], [`SnapshotError::BitmapSize`] and
    /// [`SnapshotError::BitmapStart`].
    pub fn check_epoch<K, B: Deref<Target = DirtyBitmap<K>>>(
        &mut self,
        epoch: &mut Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        if self.state == State::Part {
            return Err(SnapshotError::Incomplete {
                dest: self.name.clone(),
            });
        }
        self.geometry
            .check_bitmap(epoch.bitmap(), self.ram_start, self.reader_start)?;
        if !epoch.check_written(&self.written) {
            return Err(SnapshotError::EpochNotWritten {
                dest: self.name.clone(),
            });
        }
        self.set_ram_start(epoch.bitmap().ram_start());
        epoch.set_image(ParentImage::Id(self.image_id().to_bytes()));
        Ok(())
    }

    fn set_ram_start(&mut self, ram_start: u64) {
        self.ram_start = Some(ram_start);
        self.footer.set_ram_start(ram_start);
    }

    /// Marks the stream as incomplete until the write that begins has succeeded.
    fn begin(&mut self) -> Result<(), SnapshotError> {
        if self.state != State::Nothing {
            return Err(self.begun());
        }
        self.state = State::Part;
        Ok(())
    }

    fn begun(&self) -> SnapshotError {
        SnapshotError::StreamBegun {
            dest: self.name.clone(),
        }
    }

    fn check_cancelled(&self, progress: &WriteProgress) -> Result<(), SnapshotError> {
        match progress.wrote(0).is_break() {
            true => Err(SnapshotError::Cancelled {
                dest: self.name.clone(),
                written: 0,
            }),
            false => Ok(()),
        }
    }
}

fn cannot_seal(name: &Path, source: FooterError) -> SnapshotError {
    SnapshotError::Seal {
        dest: name.to_owned(),
        source,
    }
}

fn write_failed(name: &Path, offset: u64, source: io::Error) -> SnapshotError {
    SnapshotError::MemoryIo {
        dest: name.to_owned(),
        step: MemoryIoStep::Write,
        offset,
        source,
    }
}

impl<W> fmt::Debug for PackedStream<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedStream")
            .field("name", &self.name)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
