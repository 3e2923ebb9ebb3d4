//! Writing ranges of a source to the same ranges of a file.

mod auto;
mod chunks;
mod options;
mod pipeline;
mod positioned;
mod progress;
mod target;
mod threads;
#[cfg_attr(not(target_os = "linux"), path = "write/no_uring.rs")]
mod uring;

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

pub use options::{Engine, WriteOptions};

use crate::Memory;
use crate::limit::SizeLimit;
use chunks::Chunks;
use progress::Progress;

/// Where the bytes come from, addressed by their offset in the file.
pub trait Source {
    /// Fills all of `buf` with the bytes from `offset` on, or fails. What is in `buf` before is of no meaning.
    ///
    /// # Errors
    /// Whatever keeps the bytes from being had.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The memory of this process that holds the bytes from `offset` on: at least 1 and at most `len` bytes of it, or `None`
    /// where they have to be [read](Self::read_at). The kernel takes them from there, and nothing is copied.
    fn memory_at(&self, offset: u64, len: usize) -> Option<Memory<'_>> {
        let _ = (offset, len);
        None
    }
}

/// Bytes in memory, the first of which belongs at offset 0.
impl Source for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = rest(self, offset)
            .get(..buf.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn memory_at(&self, offset: u64, len: usize) -> Option<Memory<'_>> {
        let bytes = rest(self, offset);
        Some(Memory::from(&bytes[..bytes.len().min(len)])).filter(|memory| !memory.is_empty())
    }
}

fn rest(bytes: &[u8], offset: u64) -> &[u8] {
    usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..))
        .unwrap_or_default()
}

/// Why a write ended early. Chunks before that were written; of the rest, nothing is in flight.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A run ends before it starts, or past the largest file offset.
    #[error("the run {}..{} is no range of a file: give start <= end <= 2^63 - 1", run.start, run.end)]
    InvalidRun {
        /// The run as it was given.
        run: Range<u64>,
    },
    /// The source could not give its bytes; for memory, the kernel could not read the address (`EFAULT`).
    #[error("the source gave no bytes for offset {offset}: write again once it can be read")]
    Source {
        /// Offset of the first byte that is missing.
        offset: u64,
        /// The source's own error.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("cannot write {len} bytes at offset {offset}{}", advice(source))]
    Destination {
        /// Offset of the first byte that was not written.
        offset: u64,
        /// How many bytes were to be written there.
        len: usize,
        /// `ENOSPC`, `EDQUOT`, `EFBIG` (also for `RLIMIT_FSIZE`, in place of `SIGXFSZ`), `EIO`, `EBADF` and the like.
        source: io::Error,
    },
    /// The file took no byte and gave no error: a device at its end.
    #[error("the file takes no byte at offset {offset}, {len} were left: is it large enough?")]
    ZeroWrite {
        /// Offset of the first byte that was not written.
        offset: u64,
        /// How many bytes were to be written there.
        len: usize,
    },
    /// The file is open for appending. Nothing was written: on Linux each write would go to the end
    /// of the file, whatever its offset.
    #[error(
        "cannot write by offset to a file that is open for appending: open it without O_APPEND"
    )]
    Append,
    /// The engine that was asked for can't be had here. Nothing was written.
    #[error(
        "cannot write by {engine:?} here: choose Engine::Auto, which takes the best that there is"
    )]
    Engine {
        /// The engine.
        engine: Engine,
        /// For io_uring `ENOSYS` where the kernel has none, `EPERM` or `EACCES` where it is forbidden (`kernel.io_uring_disabled`,
        /// seccomp); for threads `EAGAIN` where the process may have no more.
        source: io::Error,
    },
    /// The progress function said [`ControlFlow::Break`].
    #[error("cancelled after {written} bytes")]
    Cancelled {
        /// Bytes written until then.
        written: u64,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => ": make room on the file system",
        io::ErrorKind::QuotaExceeded => ": raise the quota or make room within it",
        io::ErrorKind::FileTooLarge => {
            ": raise RLIMIT_FSIZE or choose a file system that takes files of this size"
        }
        _ => "",
    }
}

/// Writes the bytes of `runs` (ranges of offsets, in bytes) from `source` to the same offsets of `file`.
///
/// Every write names its offset; the file position is neither used nor moved, and nothing outside of the runs is
/// written, so they may come in any order. Runs may be empty or overlap, and one that touches or overlaps the one
/// before it is written together with it. The file grows with the writes but not beyond the last: [`grow`](crate::grow())
/// it first to its final size.
///
/// Short writes are continued, `EINTR` and `EAGAIN` retried. Memory use is bounded whatever the runs: none where the source
/// hands out its own memory, aligned as the file wants it; else one chunk, and with requests in flight at most 16 MiB more. `progress` gets the bytes written so
/// far after each piece of at most a chunk; [`ControlFlow::Break`] ends the call with [`WriteError::Cancelled`] once what was in
/// flight is written.
///
/// The source is called on this thread alone, and when the call returns or unwinds nothing is in flight: whatever
/// the [`Engine`], no borrow of the source outlives it. The bytes are in the page cache or with the device then; a sync is the
/// caller's.
///
/// Returns the bytes written; bytes of runs that overlap without standing next to each other count as often as they
/// are written.
///
/// # Errors
/// [`WriteError`]; of several failures in flight the one at the lowest offset. The file then holds the new bytes in some of the
/// runs and may hold parts of chunks.
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
pub fn write_runs<S: Source + ?Sized>(
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
        Engine::Positioned => positioned::write(job),
        Engine::Threads => threads::write(job),
        Engine::IoUring => uring::write(job),
    }
}

/// What is to be written, whichever engine does it.
struct Job<'a, 'm, I, S: ?Sized> {
    file: &'a File,
    limit: SizeLimit,
    chunks: I,
    chunk_size: usize,
    source: &'m S,
    progress: Progress<'a>,
}

/// Chunks as an engine gets them.
trait Pieces: Iterator<Item = Result<Range<u64>, WriteError>> {}

impl<I: Iterator<Item = Result<Range<u64>, WriteError>>> Pieces for I {}

fn unavailable(engine: Engine) -> impl Fn(io::Error) -> WriteError {
    move |source| WriteError::Engine { engine, source }
}

/// Where a write was refused, how much of it, and why.
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
