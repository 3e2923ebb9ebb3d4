//! Which engine a write uses, and why.

use std::fmt;
use std::io;

use super::options::Engine;
use crate::trace;

/// The engine that a write uses, and the reason why no faster one is used.
///
/// [`WriteOptions::engine_choice`](crate::WriteOptions::engine_choice) returns it. With the cargo
/// feature `tracing`, each [`write_runs`](crate::write_runs()) also reports it as an event.
#[derive(Debug)]
#[non_exhaustive]
pub struct EngineChoice {
    /// The engine; never [`Engine::Auto`].
    pub engine: Engine,
    /// Why it is used.
    pub because: EngineReason,
}

/// The reason why a write uses an engine.
#[derive(Debug)]
#[non_exhaustive]
pub enum EngineReason {
    /// It is the fastest engine for this file.
    Fastest,
    /// [`WriteOptions::engine`](crate::WriteOptions::engine) names it.
    Requested,
    /// The job has at most 1 MiB, for which no engine is faster.
    SmallJob,
    /// The file does not support direct I/O, without which no engine is faster.
    NoDirectIo {
        /// The error of the system, or what this crate does not support.
        source: io::Error,
    },
    /// No ring can be created, so threads make the direct writes.
    NoRing {
        /// The error of the system: `ENOSYS` if the kernel does not support io_uring, `EPERM` or
        /// `EACCES` if it is forbidden (`kernel.io_uring_disabled`, seccomp), `ENOMEM`.
        source: io::Error,
    },
    /// Neither a ring nor a thread can be created.
    NoRingAndNoThreads {
        /// The error of creating a ring.
        ring: io::Error,
        /// The error of creating a thread.
        threads: io::Error,
    },
}

impl EngineChoice {
    pub(super) const fn new(engine: Engine, because: EngineReason) -> Self {
        Self { engine, because }
    }

    pub(super) const fn small() -> Self {
        Self::new(Engine::Pwrite, EngineReason::SmallJob)
    }

    /// Reports the choice as an event.
    pub(super) fn report(&self) {
        trace::engine_chosen(&self.engine, &self.because, self.is_fallback());
    }

    /// Returns whether a faster engine was tried and is not available.
    #[must_use]
    pub const fn is_fallback(&self) -> bool {
        match self.because {
            EngineReason::Fastest | EngineReason::Requested | EngineReason::SmallJob => false,
            EngineReason::NoDirectIo { .. }
            | EngineReason::NoRing { .. }
            | EngineReason::NoRingAndNoThreads { .. } => true,
        }
    }
}

impl fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.engine, self.because)
    }
}

impl fmt::Display for EngineReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fastest => f.write_str("the fastest engine for this file"),
            Self::Requested => f.write_str("the options name it"),
            Self::SmallJob => f.write_str("no engine is faster for at most 1 MiB"),
            Self::NoDirectIo { source } => {
                write!(f, "the file cannot be written by direct I/O: {source}")
            }
            Self::NoRing { source } => write!(f, "io_uring is not available: {source}"),
            Self::NoRingAndNoThreads { ring, threads } => write!(
                f,
                "io_uring is not available: {ring}; no thread can be created: {threads}"
            ),
        }
    }
}
