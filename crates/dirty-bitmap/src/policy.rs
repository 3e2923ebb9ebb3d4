//! The policies that decide whether a fault unprotects a page or a block.

use std::time::{Duration, Instant};

/// A policy for how much a write fault unprotects: the page, or the whole
/// [block](crate::BLOCK_SIZE) around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// Always the page. Makes the smallest diffs and the most faults.
    Pages,
    /// Always the block. Makes the fewest faults and the largest diffs.
    Blocks,
    /// The page, until the block has had this many faults since the last checkpoint. The next fault
    /// unprotects the rest of the block.
    FaultLimit(u32),
    /// The cheaper of the two, as observed for each block.
    Cost(Costs),
}

impl Default for Policy {
    /// Returns [`Policy::Cost`] with the default [`Costs`].
    fn default() -> Self {
        Self::Cost(Costs::default())
    }
}

/// The costs of a write fault and of writing to the snapshot.
///
/// The second cost is that of the clean pages in a diff.
///
/// # Examples
/// Costs measured at start-up, on the disk that snapshots are written to:
/// ```no_run
/// use std::{fs::File, os::unix::fs::FileExt};
///
/// use dirty_bitmap::{Costs, Policy};
/// # fn write_to_a_protected_page() -> std::io::Result<()> { Ok(()) }
///
/// let (file, bytes) = (File::create("probe")?, vec![1; 8 << 20]);
/// let write = || {
///     file.write_all_at(&bytes, 0)?;
///     file.sync_data()?;
///     Ok(bytes.len() as u64)
/// };
/// let policy = Policy::Cost(Costs::measure(write_to_a_protected_page, write)?);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// The additional time of the first write to a protected page.
    pub fault: Duration,
    /// The time to write 1 MiB to the snapshot.
    pub write_mib: Duration,
}

impl Default for Costs {
    /// Returns [`Costs::DEFAULT`].
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Costs {
    /// The default costs: 4.9 microseconds for a fault and 625 microseconds for 1 MiB.
    ///
    /// The first is a third-party measurement of a stage-2 fault through the Hypervisor framework
    /// on Apple silicon. The second is a rate of 1,600 MiB/s, measured with direct writes to a
    /// virtio disk.
    pub const DEFAULT: Self = Self {
        fault: Duration::from_nanos(4_900),
        write_mib: Duration::from_micros(625),
    };

    /// Measures the costs as the medians of several calls of `fault` and `write`.
    ///
    /// `fault` writes once to a protected page. `write` writes to the medium of the snapshots and
    /// returns the number of bytes.
    ///
    /// # Errors
    /// Returns the error of the first call that fails.
    pub fn measure<E>(
        mut fault: impl FnMut() -> Result<(), E>,
        mut write: impl FnMut() -> Result<u64, E>,
    ) -> Result<Self, E> {
        let fault = median(31, || {
            let start = Instant::now();
            fault().map(|()| start.elapsed())
        })?;
        let write_mib = median(5, || {
            let start = Instant::now();
            let bytes = write()?;
            Ok(start
                .elapsed()
                .mul_f64(f64::from(1 << 20) / bytes.max(1) as f64))
        })?;
        Ok(Self { fault, write_mib })
    }

    /// Returns the costs of a fault and of writing `bytes`, in nanoseconds.
    pub(crate) fn in_nanos(self, bytes: u64) -> (i64, i64) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let write = (u128::from(nanos(self.write_mib)) * u128::from(bytes)) >> 20;
        // Saturate at one hour.
        let max = u64::pow(10, 9) * 3600;
        let signed = |nanos: u64| i64::try_from(nanos.min(max)).expect("at most an hour");
        (
            signed(nanos(self.fault)),
            signed(u64::try_from(write).unwrap_or(max)),
        )
    }
}

/// Returns the median of `count` durations. `count` is odd.
fn median<E>(
    count: usize,
    mut measure: impl FnMut() -> Result<Duration, E>,
) -> Result<Duration, E> {
    let mut all = (0..count)
        .map(|_| measure())
        .collect::<Result<Vec<_>, E>>()?;
    all.sort_unstable();
    Ok(all[count / 2])
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value_in_order_of_size() {
        let mut times = [5, 1, 4, 2, 3].map(Duration::from_secs).into_iter();
        let median = median(5, || times.next().ok_or(()));
        assert_eq!(median, Ok(Duration::from_secs(3)));
    }

    #[test]
    fn costs_saturate_at_an_hour() {
        let seconds = |fault, write_mib| Costs {
            fault: Duration::from_secs(fault),
            write_mib: Duration::from_secs(write_mib),
        };
        assert_eq!(
            seconds(90, 4).in_nanos(1 << 18),
            (90_000_000_000, 1_000_000_000)
        );
        let hour = 3_600_000_000_000;
        assert_eq!(seconds(u64::MAX, u64::MAX).in_nanos(1 << 40), (hour, hour));
    }
}
