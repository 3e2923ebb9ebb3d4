//! The builder of live snapshots.

use memory_writer::CancelToken;

use crate::options::{Method, WhenPoolFull};

/// Options for a live snapshot, created by
/// [`LiveSnapshot::options`](crate::LiveSnapshot::options).
///
/// Progress is reported by the writer: see `MemoryWriterOptions::progress`.
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `begin`"]
pub struct LiveSnapshotOptions {
    pub(crate) method: Method,
    pub(crate) kind: Kind,
    pub(crate) pool: u64,
    pub(crate) when_pool_full: WhenPoolFull,
    pub(crate) rate_limit: Option<u64>,
    pub(crate) cancel: CancelToken,
    pub(crate) remainder: u64,
    pub(crate) max_passes: u32,
}

/// Which pages an image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All of the RAM.
    Full,
    /// The pages of the epoch.
    Diff,
}

impl Default for LiveSnapshotOptions {
    fn default() -> Self {
        Self {
            method: Method::Auto,
            kind: Kind::Full,
            pool: 64 << 20,
            when_pool_full: WhenPoolFull::Wait,
            rate_limit: None,
            cancel: CancelToken::new(),
            remainder: 8 << 20,
            max_passes: 30,
        }
    }
}

impl LiveSnapshotOptions {
    /// Sets the method. The default is [`Method::Auto`].
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Sets whether to write a diff: the pages written since the last committed snapshot of the
    /// tracker. The default is false: all of the RAM.
    ///
    /// A sealed or packed diff needs a parent: see `Seal::parent` of the crate `memory-writer`.
    pub fn diff(mut self, diff: bool) -> Self {
        self.kind = match diff {
            true => Kind::Diff,
            false => Kind::Full,
        };
        self
    }

    /// Sets the size of the pool in bytes. The default is 64 MiB.
    ///
    /// The pool holds copies of pages that the guest has overwritten since the pause, until they
    /// are written to the file. It is not allocated before it is needed.
    pub fn pool(mut self, bytes: u64) -> Self {
        self.pool = bytes;
        self
    }

    /// Sets what happens when the pool is full. The default is [`WhenPoolFull::Wait`].
    pub fn when_pool_full(mut self, when_pool_full: WhenPoolFull) -> Self {
        self.when_pool_full = when_pool_full;
        self
    }

    /// Sets the maximum rate at which pages are written while the guest runs, in bytes per second.
    /// The default is no limit.
    ///
    /// The limit counts for pages in the pool too: a guest that overwrites memory faster waits, or
    /// what [`when_pool_full`](Self::when_pool_full) says.
    pub fn rate_limit(mut self, bytes_per_second: u64) -> Self {
        self.rate_limit = Some(bytes_per_second.max(1));
        self
    }

    /// Sets the token that cancels the snapshot from another thread. It may be that of the writer
    /// too.
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Sets the number of dirty bytes at which pre-copy ends. The default is 8 MiB.
    ///
    /// These bytes are protected in the pause, which takes about a millisecond for 4 MiB in pages
    /// of 4 KiB.
    pub fn remainder(mut self, bytes: u64) -> Self {
        self.remainder = bytes;
        self
    }

    /// Sets the maximum number of passes of pre-copy. The default is 30.
    pub fn max_passes(mut self, passes: u32) -> Self {
        self.max_passes = passes.max(1);
        self
    }
}
