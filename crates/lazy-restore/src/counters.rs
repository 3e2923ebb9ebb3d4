//! What was filled, and how long faults took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The reason why pages were filled, or will not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FillReason {
    /// An access waited for them, or for their neighbors.
    Fault,
    /// They are in the working set.
    WorkingSet,
    /// All pages are filled in the background.
    Prefetch,
    /// They are zeros, for any of these reasons.
    Zeros,
    /// The guest's owner has discarded them.
    Removed,
    /// They cannot be read.
    Poisoned,
}

impl FillReason {
    const COUNT: usize = Self::Poisoned as usize + 1;
}

/// Upper bounds of the histogram, in microseconds.
pub(crate) const BOUNDS: [u64; 14] = [
    10, 20, 40, 60, 100, 200, 400, 1_000, 2_000, 4_000, 10_000, 40_000, 100_000, 1_000_000,
];

/// Totals of all threads that fill memory from one source.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    bytes: [AtomicU64; FillReason::COUNT],
    faults: AtomicU64,
    /// Numbers of faults up to each bound, and beyond the last.
    latencies: [AtomicU64; BOUNDS.len() + 1],
    latency_nanos: AtomicU64,
}

impl Counters {
    pub(crate) fn add_filled(&self, reason: FillReason, bytes: u64) {
        self.bytes[reason as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn bytes(&self, reason: FillReason) -> u64 {
        self.bytes[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts a handled fault.
    pub(crate) fn add_fault(&self, took: Duration) {
        let bucket = BOUNDS.partition_point(|bound| Duration::from_micros(*bound) < took);
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.latencies[bucket].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.latency_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Returns the number of faults that took no longer than each of [`BOUNDS`].
    pub(crate) fn latencies(&self) -> [u64; BOUNDS.len()] {
        let mut sum = 0;
        std::array::from_fn(|bucket| {
            sum += self.latencies[bucket].load(Ordering::Relaxed);
            sum
        })
    }

    /// Returns the sum of the times of all faults.
    pub(crate) fn latency_sum(&self) -> Duration {
        Duration::from_nanos(self.latency_nanos.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_counts_faults_up_to_each_bound() {
        let counters = Counters::default();
        for micros in [5, 10, 11, 60, 2_000_000] {
            counters.add_fault(Duration::from_micros(micros));
        }
        let latencies = counters.latencies();
        assert_eq!(latencies[..4], [2, 3, 3, 4]);
        assert_eq!(latencies[BOUNDS.len() - 1], 4);
        assert_eq!(counters.faults(), 5);
        assert_eq!(counters.latency_sum(), Duration::from_micros(2_000_086));
    }

    #[test]
    fn bytes_are_counted_by_reason() {
        let counters = Counters::default();
        counters.add_filled(FillReason::Poisoned, 4096);
        counters.add_filled(FillReason::Poisoned, 4096);
        assert_eq!(counters.bytes(FillReason::Poisoned), 8192);
        assert_eq!(counters.bytes(FillReason::Fault), 0);
    }
}
