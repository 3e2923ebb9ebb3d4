//! Writes ranges of a source to the same ranges of a file.

mod auto;
mod chunks;
mod options;
mod pipeline;
mod progress;
mod pwrite;
mod target;
mod threads;
#[cfg_attr(not(target_os = "linux"), path = "write/no_uring.rs")]
mod uring;

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use host_memory::{HostMemory, available_len, check_range};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

pub use options::{Engine, WriteOptions};

use crate::limit::SizeLimit;
use chunks::Chunks;
use progress::Progress;

/// A source of the bytes of runs, addressed by their offset in the file.
///
/// The methods are those of the trait `PageReader` of the crate `page-reader`, of which this crate
/// needs a part.
pub trait RunSource {
    /// Fills all of `buf` with the bytes from `offset` on. Previous contents of `buf` are ignored.
    ///
    /// # Errors
    /// Any reason why the bytes cannot be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns the memory of this process that holds the bytes from `offset` on: at least 1 and at
    /// most `len` bytes. Returns `None` if they must be [read](Self::read_at). The kernel reads the
    /// memory directly, without a copy.
    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let _ = (offset, len);
        None
    }
}

/// Bytes in memory, the first of which belongs at offset 0.
impl RunSource for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.len() as u64)?;
        // The range is inside the slice, so the offset fits in usize.
        buf.copy_from_slice(&self[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = available_len(offset, len, self.len() as u64)?;
        Some(HostMemory::from(&self[offset as usize..][..len]))
    }
}

/// An error of writing runs. The chunks before it were written; no request is in flight.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A run ends before it starts, or past the largest file offset.
    #[error("the run {}..{} is not a valid file range: pass start <= end <= 2^63 - 1", run.start, run.end)]
    InvalidRun {
        /// The invalid run.
        run: Range<u64>,
    },
    /// The source failed to provide its bytes, or the kernel could not read the memory (`EFAULT`).
    #[error("failed to read the source at offset {offset}")]
    Source {
        /// The offset of the first missing byte.
        offset: u64,
        /// The error of the source.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("failed to write {len} bytes at offset {offset}{}", advice(source))]
    Destination {
        /// The offset of the first byte that was not written.
        offset: u64,
        /// The number of bytes of the failed write.
        len: usize,
        /// The error of the system: `ENOSPC`, `EDQUOT`, `EFBIG` (also for `RLIMIT_FSIZE`, in place
        /// of `SIGXFSZ`), `EIO`, `EBADF` and others.
        source: io::Error,
    },
    /// The file accepted no byte and returned no error: a device at its end.
    #[error(
        "the file accepts no byte at offset {offset}, with {len} bytes left: use a larger file or device"
    )]
    ZeroWrite {
        /// The offset of the first byte that was not written.
        offset: u64,
        /// The number of bytes of the failed write.
        len: usize,
    },
    /// The file is open for appending. Nothing was written: on Linux each write would go to the end
    /// of the file, regardless of its offset.
    #[error(
        "failed to write at an offset of a file that is open for appending: open it without O_APPEND"
    )]
    Append,
    /// The requested engine is not available. Nothing was written.
    #[error(
        "the engine {engine:?} is not available: choose Engine::Auto, which picks the fastest \
         available one"
    )]
    Engine {
        /// The requested engine.
        engine: Engine,
        /// The error of the system. For io_uring `ENOSYS` if the kernel does not support it,
        /// `EPERM` or `EACCES` if it is forbidden (`kernel.io_uring_disabled`, seccomp). For
        /// threads `EAGAIN` if the process cannot create more.
        source: io::Error,
    },
    /// The progress function returned [`ControlFlow::Break`].
    #[error("cancelled after {written} bytes")]
    Cancelled {
        /// The number of bytes written before.
        written: u64,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => ": make room on the file system",
        io::ErrorKind::QuotaExceeded => ": raise the quota or make room within it",
        io::ErrorKind::FileTooLarge => {
            ": raise RLIMIT_FSIZE or choose a file system that supports files of this size"
        }
        _ => "",
    }
}

/// Writes the bytes of `runs` (ranges of offsets, in bytes) from `source` to the same offsets of
/// `file`. Returns the number of bytes written. Bytes of overlapping runs that are not consecutive
/// count each time they are written.
///
/// Every write is positioned: the file position is neither used nor moved. Nothing outside the runs
/// is written, so they may be in any order. Runs may be empty or overlap, and one that touches or
/// overlaps the previous one is written together with it. The file grows with the writes but not
/// beyond the last: [`grow`](crate::grow()) it first to its final size.
///
/// Short writes are continued, and `EINTR` and `EAGAIN` are retried. Memory use is bounded for any
/// runs: none if the source exposes its own memory, aligned as the file requires; otherwise one
/// chunk, and at most 16 MiB more with requests in flight. `progress` receives the number of bytes
/// written so far after each piece of at most a chunk. [`ControlFlow::Break`] ends the call with
/// [`WriteError::Cancelled`] once the requests in flight are complete.
///
/// The source is called on this thread only. When the call returns or unwinds, no request is in
/// flight: with every [`Engine`], no borrow of the source outlives the call. The bytes are then in
/// the page cache or on the device; the caller syncs the file.
///
/// # Errors
/// [`WriteError`]; of several failures in flight, the one at the lowest offset. The file then
/// contains the new bytes in some of the runs and may contain parts of chunks.
///
/// # Examples
/// ```
/// use sparse_file::{WriteOptions, grow, write_runs};
/// use std::ops::ControlFlow;
///
/// let ram = vec![7; 1 << 20];
/// let file = tempfile::tempfile()?;
/// grow(&file, ram.len() as u64)?;
/// let dirty = [0..4096, 8192..16384];
/// let written = write_runs(&file, dirty, ram.as_slice(), &WriteOptions::new(), &mut |bytes| {
///     println!("{bytes} bytes");
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(written, 12288);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_runs<S: RunSource + ?Sized>(
    file: &File,
    runs: impl IntoIterator<Item = Range<u64>>,
    source: &S,
    options: &WriteOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<u64, WriteError> {
    let failed = |source| WriteError::Destination {
        offset: 0,
        len: 0,
        source,
    };
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| failed(errno.into()))?;
    if OFlag::from_bits_retain(flags).contains(OFlag::O_APPEND) {
        return Err(WriteError::Append);
    }
    let job = Job {
        file,
        limit: SizeLimit::of(file).map_err(failed)?,
        chunks: Chunks::new(runs.into_iter(), options.chunk_size),
        chunk_size: options.chunk_size,
        source,
        progress: Progress::new(progress),
    };
    match options.engine {
        Engine::Auto => auto::write(job),
        Engine::Pwrite => pwrite::write(job),
        Engine::Threads => threads::write(job),
        Engine::IoUring => uring::write(job),
    }
}

/// The arguments of a write, shared by all engines.
struct Job<'a, 'm, I, S: ?Sized> {
    file: &'a File,
    limit: SizeLimit,
    chunks: I,
    chunk_size: usize,
    source: &'m S,
    progress: Progress<'a>,
}

/// An iterator over the chunks for an engine.
trait Pieces: Iterator<Item = Result<Range<u64>, WriteError>> {}

impl<I: Iterator<Item = Result<Range<u64>, WriteError>>> Pieces for I {}

fn unavailable(engine: Engine) -> impl Fn(io::Error) -> WriteError {
    move |source| WriteError::Engine { engine, source }
}

/// Returns the offset, length and error number of a refused write.
#[cfg(test)]
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, WriteError>) -> (u64, usize, std::io::Error) {
    match result {
        Err(WriteError::Destination {
            offset,
            len,
            source,
        }) => (offset, len, source),
        other => panic!("{other:?}"),
    }
}
