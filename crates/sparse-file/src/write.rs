//! Writes ranges of a source to the same ranges of a file.

mod auto;
mod choice;
mod chunks;
mod error;
mod job;
mod options;
mod pipeline;
mod progress;
mod pwrite;
mod source;
mod target;
mod threads;
#[cfg_attr(not(target_os = "linux"), path = "write/no_uring.rs")]
mod uring;

use std::fs::File;
use std::ops::{ControlFlow, Range};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

pub use choice::{EngineChoice, EngineReason};
pub use error::WriteError;
pub use options::{Engine, WriteOptions};
pub use source::RunSource;

use crate::limit::SizeLimit;
use chunks::Chunks;
use job::Job;
use progress::Progress;

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
/// Returns a [`WriteError`]; of several failures in flight, the one at the lowest offset. The file
/// then contains the new bytes in some of the runs and may contain parts of chunks.
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
    let requested = options.engine;
    if requested != Engine::Auto {
        EngineChoice::new(requested, EngineReason::Requested).report();
    }
    match requested {
        Engine::Auto => auto::write(job),
        Engine::Pwrite => pwrite::write(job),
        Engine::Threads => threads::write(job),
        Engine::IoUring => uring::write(job),
    }
}
