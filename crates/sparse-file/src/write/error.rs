//! Errors of writing runs.

use std::io;
use std::ops::Range;

use super::options::Engine;

/// An error of writing runs. The chunks before it were written; no request is in flight.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A run ends before it starts, or past the largest file offset.
    #[error("the run {:#x}..{:#x} is not a valid file range: pass start <= end <= 2^63 - 1", run.start, run.end)]
    InvalidRun {
        /// The invalid run.
        run: Range<u64>,
    },
    /// The source failed to provide its bytes, or the kernel could not read the memory (`EFAULT`).
    #[error("failed to read the source at offset {offset:#x}: {source}")]
    Source {
        /// The offset of the page with the first missing byte: in pages from the start of the read
        /// on.
        offset: u64,
        /// The error of the source.
        source: io::Error,
    },
    /// The file could not be written.
    #[error(
        "failed to write a range of length {len} at offset {offset:#x}{}: {source}",
        advice(source)
    )]
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
        "the file accepts no byte at offset {offset:#x}, with bytes left ({len}): use a larger file or device"
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
         available one: {source}"
    )]
    Engine {
        /// The requested engine.
        engine: Engine,
        /// The error of the system. For io_uring `ENOSYS` if the kernel does not support it,
        /// `EPERM` or `EACCES` if it is forbidden (`kernel.io_uring_disabled`, seccomp). For
        /// threads `EAGAIN` if the process cannot create more.
        source: io::Error,
    },
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
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

/// Returns the error of an engine that is not available.
pub(super) fn unavailable(engine: Engine) -> impl Fn(io::Error) -> WriteError {
    move |source| WriteError::Engine { engine, source }
}

/// Returns the offset, length and error number of a refused write.
#[cfg(test)]
#[track_caller]
pub(super) fn refused<T: std::fmt::Debug>(
    result: Result<T, WriteError>,
) -> (u64, usize, std::io::Error) {
    match result {
        Err(WriteError::Destination {
            offset,
            len,
            source,
        }) => (offset, len, source),
        other => panic!("{other:?}"),
    }
}
