//! Options of writes.

/// The mechanism that writes bytes to the file. All engines write the same bytes. They differ in
/// speed and in the contents of the page cache.
///
/// [`Threads`](Self::Threads) and [`IoUring`](Self::IoUring) write whole, aligned blocks past the
/// page cache if the file supports direct I/O, directly from the memory of a source that exposes
/// it. Everything else goes through the page cache: parts of blocks at the ends of a run, runs that
/// the file system refuses, and files without direct I/O. Direct I/O is also unavailable for a file
/// that is open for appending, or that is not reachable as `/proc/self/fd/N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// Picks the fastest available engine. Never fails where another engine would succeed.
    ///
    /// On Linux, for a file that supports direct I/O, this is [`IoUring`](Self::IoUring), or
    /// [`Threads`](Self::Threads) if no ring can be created (old kernels, containers that forbid
    /// it, memory limits). In other cases, and for small jobs, [`Pwrite`](Self::Pwrite). On
    /// macOS always the latter, with `F_NOCACHE` during a large job.
    #[default]
    Auto,
    /// Makes one `pwrite(2)` after another on the calling thread. Works on every file.
    Pwrite,
    /// Uses 8 threads for the duration of the call. Each makes one `pwrite(2)` after another for
    /// ranges of 256 KiB and more. Smaller ranges go through the page cache, because the threads
    /// would wait for each other.
    Threads,
    /// Uses a ring of `io_uring(7)` for the duration of the call, with at most 64 requests of
    /// together 32 MiB in flight. Linux only.
    ///
    /// The kernel may clean up the ring for about 60 ms after the call has returned, and wakes the
    /// calling thread once for it. This ends an interruptible wait of the thread early: `EINTR`
    /// from `epoll_wait` or `KVM_RUN` without a signal.
    IoUring,
}

impl Engine {
    /// All engines, on every system. One that is not available returns
    /// [`WriteError::Engine`](crate::WriteError::Engine).
    pub const ALL: &[Self] = &[Self::Auto, Self::Pwrite, Self::Threads, Self::IoUring];
}

/// Options of [`write_runs`](crate::write_runs()). The defaults suit every file system.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "options do nothing until they are passed to a write"]
pub struct WriteOptions {
    pub(super) engine: Engine,
    pub(super) chunk_size: usize,
}

impl WriteOptions {
    /// The smallest chunk size: a page.
    pub const MIN_CHUNK_SIZE: usize = 4 << 10;
    /// The largest chunk size. macOS refuses a write of 2 GiB, and Linux shortens it.
    pub const MAX_CHUNK_SIZE: usize = 1 << 30;

    /// Creates options with [`Engine::Auto`] and chunks of 1 MiB.
    pub const fn new() -> Self {
        Self {
            engine: Engine::Auto,
            chunk_size: 1 << 20,
        }
    }

    /// Sets the engine.
    pub const fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Sets the maximum number of bytes that one call writes, and that are written between two
    /// calls of the progress function. Rounded up to a power of two between
    /// [`MIN_CHUNK_SIZE`](Self::MIN_CHUNK_SIZE) and [`MAX_CHUNK_SIZE`](Self::MAX_CHUNK_SIZE). A
    /// chunk never crosses a multiple of this size in the file.
    pub fn chunk_size(mut self, bytes: usize) -> Self {
        self.chunk_size = bytes
            .clamp(Self::MIN_CHUNK_SIZE, Self::MAX_CHUNK_SIZE)
            .next_power_of_two();
        self
    }
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn every_engine_is_listed_once() {
        for (index, engine) in Engine::ALL.iter().enumerate() {
            let expected = match engine {
                Engine::Auto => 0,
                Engine::Pwrite => 1,
                Engine::Threads => 2,
                Engine::IoUring => 3,
            };
            assert_eq!(index, expected);
        }
        assert_eq!(Engine::ALL.len(), 4);
    }

    #[rstest]
    #[case(0, 4096)]
    #[case(4097, 8192)]
    #[case(1 << 20, 1 << 20)]
    #[case(usize::MAX, 1 << 30)]
    fn any_chunk_size_becomes_a_valid_one(#[case] given: usize, #[case] used: usize) {
        assert_eq!(WriteOptions::new().chunk_size(given).chunk_size, used);
    }
}
