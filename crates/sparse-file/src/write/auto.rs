//! Selects the engine for the file, the job and the machine.

use std::fs::File;

use super::choice::{EngineChoice, EngineReason};
use super::error::WriteError;
use super::job::{Job, Pieces};
use super::options::{Engine, WriteOptions};
use super::pwrite;
use super::source::RunSource;

/// The largest job in bytes that is written through the page cache. Up to this size, the page cache
/// was not slower than a ring on ext4, with the sync afterwards included.
const SMALL: u64 = 1 << 20;

impl WriteOptions {
    /// Returns the engine that a write of `bytes` bytes to `file` uses with these options, and why.
    ///
    /// Tries what such a write would try, without writing: [`Engine::Auto`] opens the file again
    /// for direct I/O, and creates a ring or threads for a moment. An engine that is requested is
    /// returned without trying it. Each call takes up to a millisecond. A later write may choose
    /// another engine if the limits of the process change.
    ///
    /// # Examples
    /// ```
    /// use sparse_file::{EngineReason, WriteOptions};
    ///
    /// let file = tempfile::tempfile()?;
    /// let choice = WriteOptions::new().engine_choice(&file, 1 << 30);
    /// match &choice.because {
    ///     EngineReason::NoRing { source } => println!("allow io_uring here: {source}"),
    ///     _ => println!("{choice}"),
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    #[must_use]
    pub fn engine_choice(&self, file: &File, bytes: u64) -> EngineChoice {
        match self.engine {
            Engine::Auto if bytes <= SMALL => EngineChoice::small(),
            Engine::Auto => choose(file),
            engine @ (Engine::Pwrite | Engine::Threads | Engine::IoUring) => {
                EngineChoice::new(engine, EngineReason::Requested)
            }
        }
    }
}

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
        EngineChoice::small().report();
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
            not_direct(source).report();
            return pwrite::write(job);
        }
    };
    match Ring::new(&target.file) {
        Ok(ring) => {
            by_ring().report();
            pipeline::write(ring, target.alignment, job)
        }
        Err(error) => thread::scope(|scope| match Pool::start(scope, &target.file) {
            Ok(pool) => {
                by_threads(error).report();
                pipeline::write(pool, target.alignment, job)
            }
            Err(threads) => {
                alone(error, threads).report();
                pwrite::write(job)
            }
        }),
    }
}

/// Returns the choice of [`large`] for a file.
#[cfg(target_os = "linux")]
fn choose(file: &File) -> EngineChoice {
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
    choose(job.file).report();
    let _uncached = crate::sys::Uncached::new(job.file);
    pwrite::write(job)
}

/// Returns the choice of [`large`] for a file.
#[cfg(not(target_os = "linux"))]
fn choose(_: &File) -> EngineChoice {
    EngineChoice::new(Engine::Pwrite, EngineReason::Fastest)
}
