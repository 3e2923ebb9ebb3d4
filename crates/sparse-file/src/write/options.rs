//! How to write.

/// The way bytes get to the file. All give the same bytes; they differ in speed, and in what is left in the page cache.
///
/// [`Threads`](Self::Threads) and [`IoUring`](Self::IoUring) write whole, aligned blocks past the page cache where the file takes
/// direct I/O, straight from the memory of a source that hands it out. What is left goes through the page cache: the parts of
/// blocks at the ends of a run, a run that the file system refuses, and all of a file that has no direct I/O. A direct write to a
/// file opened for appending, or not reachable as `/proc/self/fd/N`, can't be had either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The best that there is, and never an error that another engine would not give.
    ///
    /// On Linux, for a file that takes direct I/O, [`IoUring`](Self::IoUring), or [`Threads`](Self::Threads) where no ring can
    /// be made (old kernels, containers that forbid it, memory limits). Else, and for small jobs,
    /// [`Positioned`](Self::Positioned). On macOS always that, with `F_NOCACHE` while a large job is written.
    #[default]
    Auto,
    /// One `pwrite(2)` after the other on the calling thread: works on every file.
    Positioned,
    /// 8 threads for the length of the call, one `pwrite(2)` after the other in each, for ranges of 256 KiB and more; smaller ones
    /// go through the page cache, as the threads would wait for each other.
    Threads,
    /// A ring of `io_uring(7)` for the length of the call, with at most 64 requests of together 32 MiB in flight. Linux.
    ///
    /// The kernel may still tidy up after the ring when the call has returned, for some 60 ms, and wakes the calling thread for it
    /// once: an interruptible wait of it ends early then (`EINTR` from `epoll_wait` or `KVM_RUN`, though no signal came).
    IoUring,
}

/// Options of [`write_runs`](crate::write_runs()); the defaults are right for any file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    pub(super) engine: Engine,
    pub(super) chunk_size: usize,
}

impl WriteOptions {
    /// The smallest chunk: a page.
    pub const MIN_CHUNK_SIZE: usize = 4 << 10;
    /// The largest chunk. macOS refuses a write of 2 GiB, Linux cuts it short.
    pub const MAX_CHUNK_SIZE: usize = 1 << 30;

    /// [`Engine::Auto`] with chunks of 1 MiB.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            engine: Engine::Auto,
            chunk_size: 1 << 20,
        }
    }

    /// The engine to write with.
    #[must_use]
    pub const fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// At most how many bytes one call writes, and how many lie between two calls of the progress function. Rounded up to a
    /// power of two within [`MIN_CHUNK_SIZE`](Self::MIN_CHUNK_SIZE) and [`MAX_CHUNK_SIZE`](Self::MAX_CHUNK_SIZE); a chunk never
    /// crosses a multiple of it in the file.
    #[must_use]
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

    #[rstest]
    #[case(0, 4096)]
    #[case(4097, 8192)]
    #[case(1 << 20, 1 << 20)]
    #[case(usize::MAX, 1 << 30)]
    fn any_chunk_size_becomes_one_that_works(#[case] given: usize, #[case] used: usize) {
        assert_eq!(WriteOptions::new().chunk_size(given).chunk_size, used);
    }
}
