//! Selects the engine for the file, the job and the machine.

use super::error::WriteError;
use super::job::{Job, Pieces};
use super::pwrite;
use super::source::RunSource;

/// Maximum size in bytes of a job that is written through the page cache: including the sync
/// afterwards, that was not slower than a ring on ext4.
const SMALL: u64 = 1 << 20;

pub(super) fn write<I: Pieces, S: RunSource + ?Sized>(
    mut job: Job<'_, '_, I, S>,
) -> Result<u64, WriteError> {
    let mut bytes = 0;
    let mut seen = Vec::new();
    while bytes <= SMALL
        && let Some(chunk) = job.chunks.next()
    {
        bytes += chunk.as_ref().map_or(0, |chunk| chunk.end - chunk.start);
        seen.push(chunk);
    }
    let job = Job {
        file: job.file,
        limit: job.limit,
        chunks: seen.into_iter().chain(job.chunks),
        chunk_size: job.chunk_size,
        source: job.source,
        progress: job.progress,
    };
    if bytes <= SMALL {
        pwrite::write(job)
    } else {
        large(job)
    }
}

#[cfg(target_os = "linux")]
fn large<I: Pieces, S: RunSource + ?Sized>(job: Job<'_, '_, I, S>) -> Result<u64, WriteError> {
    use std::thread;

    use super::pipeline;
    use super::target::Target;
    use super::threads::Pool;
    use super::uring::Ring;

    let Some(target) = Target::direct(job.file) else {
        return pwrite::write(job);
    };
    match Ring::new(&target.file) {
        Ok(ring) => pipeline::write(ring, target.alignment, job),
        Err(_) => thread::scope(|scope| match Pool::start(scope, &target.file) {
            Ok(pool) => pipeline::write(pool, target.alignment, job),
            Err(_) => pwrite::write(job),
        }),
    }
}

/// macOS writes a file under a lock, so threads would wait for each other. Bypassing the page cache
/// is faster.
#[cfg(not(target_os = "linux"))]
fn large<I: Pieces, S: RunSource + ?Sized>(job: Job<'_, '_, I, S>) -> Result<u64, WriteError> {
    let _uncached = crate::sys::Uncached::new(job.file);
    pwrite::write(job)
}
