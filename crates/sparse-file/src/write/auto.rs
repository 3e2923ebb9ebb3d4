//! Selects the engine for the file, the job and the machine.

use std::fs::File;

use super::choice::{EngineChoice, EngineReason};
use super::error::WriteError;
use super::job::{Job, Pieces};
use super::options::Engine;
use super::pwrite;
use super::source::RunSource;
use crate::trace;

/// Maximum size in bytes of a job that is written through the page cache: including the sync
/// afterwards, that was not slower than a ring on ext4.
pub(super) const SMALL: u64 = 1 << 20;

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
        trace::engine_chosen(&EngineChoice::small());
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

    let target = match Target::direct(job.file) {
        Ok(target) => target,
        Err(source) => {
            trace::engine_chosen(&not_direct(source));
            return pwrite::write(job);
        }
    };
    match Ring::new(&target.file) {
        Ok(ring) => {
            trace::engine_chosen(&by_ring());
            pipeline::write(ring, target.alignment, job)
        }
        Err(error) => thread::scope(|scope| match Pool::start(scope, &target.file) {
            Ok(pool) => {
                trace::engine_chosen(&by_threads(error));
                pipeline::write(pool, target.alignment, job)
            }
            Err(threads) => {
                trace::engine_chosen(&alone(error, threads));
                pwrite::write(job)
            }
        }),
    }
}

/// Returns the choice of [`large`] for a file.
#[cfg(target_os = "linux")]
pub(super) fn choose(file: &File) -> EngineChoice {
    use std::thread;

    use super::target::Target;
    use super::threads::Pool;
    use super::uring::Ring;

    let target = match Target::direct(file) {
        Ok(target) => target,
        Err(source) => return not_direct(source),
    };
    match Ring::new(&target.file) {
        Ok(_) => by_ring(),
        Err(error) => thread::scope(|scope| match Pool::start(scope, &target.file) {
            Ok(_) => by_threads(error),
            Err(threads) => alone(error, threads),
        }),
    }
}

#[cfg(target_os = "linux")]
fn not_direct(source: std::io::Error) -> EngineChoice {
    EngineChoice::new(Engine::Pwrite, EngineReason::NoDirectIo { source })
}

#[cfg(target_os = "linux")]
fn by_ring() -> EngineChoice {
    EngineChoice::new(Engine::IoUring, EngineReason::Fastest)
}

#[cfg(target_os = "linux")]
fn by_threads(source: std::io::Error) -> EngineChoice {
    EngineChoice::new(Engine::Threads, EngineReason::NoRing { source })
}

#[cfg(target_os = "linux")]
fn alone(ring: std::io::Error, threads: std::io::Error) -> EngineChoice {
    let because = EngineReason::NoRingAndNoThreads { ring, threads };
    EngineChoice::new(Engine::Pwrite, because)
}

/// macOS writes a file under a lock, so threads would wait for each other. Bypassing the page cache
/// is faster.
#[cfg(not(target_os = "linux"))]
fn large<I: Pieces, S: RunSource + ?Sized>(job: Job<'_, '_, I, S>) -> Result<u64, WriteError> {
    trace::engine_chosen(&choose(job.file));
    let _uncached = crate::sys::Uncached::new(job.file);
    pwrite::write(job)
}

/// Returns the choice of [`large`] for a file.
#[cfg(not(target_os = "linux"))]
pub(super) fn choose(_: &File) -> EngineChoice {
    EngineChoice::new(Engine::Pwrite, EngineReason::Fastest)
}
