//! Options of streams.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dirty_bitmap::Coverage;
use image_format::Layout;
use sparse_file::{CancelToken, Progress};

use super::{PackedStream, State};
use crate::error::SnapshotError;
use crate::geometry::Geometry;
use crate::options::Skip;
use crate::progress::Reporter;
use crate::seal::Seal;
use crate::sealing::FooterBuilder;

/// Options for a [`PackedStream`], created by [`PackedStream::options`]. The defaults are those of
/// [`PackedStream::new`].
///
/// # Examples
/// ```
/// use memory_writer::PackedStream;
///
/// let mut stream = PackedStream::options()
///     .skip_zeros(true)
///     .open(Vec::new(), 1 << 20, 4096)?;
/// stream.set_metadata(b"vCPU state")?;
/// stream.write_full(&vec![0; 1 << 20])?;
/// assert!(stream.finish()?.len() < 8192); // no page
/// # Ok::<(), memory_writer::SnapshotError>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `open`"]
pub struct PackedStreamOptions {
    name: PathBuf,
    skip: Skip,
    read_untouched: bool,
    seal: Seal,
    ram_start: Option<u64>,
    reporter: Reporter,
}

impl PackedStreamOptions {
    pub(super) fn new() -> Self {
        Self {
            name: PathBuf::from("(stream)"),
            skip: Skip::default(),
            read_untouched: false,
            seal: Seal::new(),
            ram_start: None,
            reporter: Reporter::default(),
        }
    }

    /// Sets the name of the stream in errors. The default is `(stream)`.
    pub fn name(mut self, name: impl Into<PathBuf>) -> Self {
        self.name = name.into();
        self
    }

    /// Sets the guest-physical address of the first byte of the memory file, as
    /// [`MemoryWriterOptions::ram_start`](crate::MemoryWriterOptions::ram_start) does.
    pub fn ram_start(mut self, address: u64) -> Self {
        self.ram_start = Some(address);
        self
    }

    /// Sets the id, parent, regions and metadata in the footer. The default is [`Seal::new`].
    pub fn seal(mut self, seal: Seal) -> Self {
        self.seal = seal;
        self
    }

    /// Skips pages of zeros in full dumps, as
    /// [`MemoryWriterOptions::skip_zeros`](crate::MemoryWriterOptions::skip_zeros) does. They are
    /// found before the first page is written, so pages that are not zero are read twice.
    pub fn skip_zeros(mut self, skip: bool) -> Self {
        self.skip.zeros = skip;
        self
    }

    /// Skips untouched RAM in full dumps without reading it, as
    /// [`MemoryWriterOptions::skip_untouched`](crate::MemoryWriterOptions::skip_untouched) does.
    pub fn skip_untouched(mut self, skip: bool) -> Self {
        self.skip.untouched = skip;
        self
    }

    /// Sets whether to read untouched RAM like any other, without a query for it, as
    /// [`MemoryWriterOptions::read_untouched`](crate::MemoryWriterOptions::read_untouched) does.
    pub fn read_untouched(mut self, read: bool) -> Self {
        self.read_untouched = read;
        self
    }

    /// Calls `callback` on the writing thread before the first byte, for each run of skipped pages,
    /// and after each piece of at most 1 MiB. It cancels the write by returning
    /// [`ControlFlow::Break`].
    pub fn progress(
        mut self,
        callback: impl FnMut(Progress) -> ControlFlow<()> + Send + 'static,
    ) -> Self {
        self.reporter.callback = Some(Arc::new(Mutex::new(callback)));
        self
    }

    /// Lets `token` cancel the write, which then ends with [`SnapshotError::Cancelled`] after the
    /// current piece. A write to a stream that blocks is not interrupted.
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.reporter.cancel = token;
        self
    }

    /// Begins an image of `ram_size` bytes of RAM in pages of `page_size` bytes. Writes nothing
    /// yet. `out` must be blocking.
    ///
    /// # Errors
    /// - [`SnapshotError::Ram`] if a size is invalid.
    /// - [`SnapshotError::Seal`] if regions or metadata do not fit the footer.
    /// - [`SnapshotError::Id`] if the system provides no random numbers.
    pub fn open<W: Write>(
        &self,
        out: W,
        ram_size: u64,
        page_size: u64,
    ) -> Result<PackedStream<W>, SnapshotError> {
        let geometry = Geometry::new(ram_size, page_size)?;
        let footer =
            FooterBuilder::new(self.seal.clone(), Layout::Packed, geometry, self.ram_start);
        Ok(PackedStream {
            out,
            footer: footer.map_err(|error| error.of_snapshot(self.name.clone()))?,
            name: self.name.clone(),
            geometry,
            ram_start: self.ram_start,
            reader_start: None,
            skip: self.skip,
            read_untouched: self.read_untouched,
            reporter: self.reporter.clone(),
            state: State::Nothing,
            written: Coverage::new(),
        })
    }
}
