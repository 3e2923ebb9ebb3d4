//! What a live snapshot did.

use std::fmt;
use std::time::Duration;

use crate::options::Method;

/// What a live snapshot did, and how long it took.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The method that was used. Not [`Method::Auto`].
    pub method: Method,
    /// The time that [`begin`](crate::LiveSnapshotOptions::begin) took, while the guest ran.
    pub prepared_in: Duration,
    /// The passes of pre-copy, while the guest ran.
    pub passes: Vec<PreCopyPass>,
    /// The reason why pre-copy ended, and what it expected of the pause.
    pub convergence: Option<Convergence>,
    /// The time that [`freeze`](crate::LiveSnapshot::freeze) took: the share of the guest's pause
    /// that depends on this crate.
    pub freeze: Duration,
    /// The number of bytes that were protected again in the pause.
    pub protected_in_pause: u64,
    /// The time from the end of `freeze` until all pages were written.
    pub written_in: Duration,
    /// The number of bytes that were copied to the pool because the guest was about to overwrite
    /// them.
    pub copied_before_write: u64,
    /// The largest number of bytes in the pool.
    pub pool_peak: u64,
    /// The number of write faults that waited for room in the pool.
    pub pool_waits: u64,
    /// The time that write faults waited for room in the pool, or were delayed.
    pub pool_waited: Duration,
}

/// A pass of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PreCopyPass {
    /// The number of bytes written.
    pub written: u64,
    /// The time that the write took.
    pub took: Duration,
    /// The number of bytes that the guest dirtied meanwhile.
    pub dirtied: u64,
}

impl PreCopyPass {
    /// Returns the rate at which the guest dirtied memory, in bytes per second.
    #[must_use]
    pub fn dirty_rate(&self) -> f64 {
        per_second(self.dirtied, self.took)
    }

    /// Returns the rate at which the image was written, in bytes per second.
    #[must_use]
    pub fn write_rate(&self) -> f64 {
        per_second(self.written, self.took)
    }
}

fn per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-9)
}

/// How pre-copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Convergence {
    /// The reason.
    pub reason: StopReason,
    /// The number of bytes that were dirty then.
    pub remaining: u64,
    /// The time in which these bytes would be written at the rate of the last pass. It is the
    /// expected pause if the tracker cannot copy pages before they are overwritten.
    pub expected_write: Duration,
}

/// The reason why pre-copy made no further pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StopReason {
    /// Few bytes are dirty.
    SmallRemainder,
    /// A pass left nearly as many dirty bytes as the pass before.
    NotShrinking,
    /// The largest number of passes was made.
    MaxPasses,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SmallRemainder => "few bytes are dirty",
            Self::NotShrinking => "the guest dirties memory nearly as fast as it is written",
            Self::MaxPasses => "the largest number of passes was made",
        })
    }
}
