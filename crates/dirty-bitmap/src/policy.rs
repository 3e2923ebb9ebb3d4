//! What decides between pages and blocks.

use std::time::{Duration, Instant};

/// How much one write fault opens: the page, or the whole [block](crate::BLOCK_SIZE) around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// Always the page: the smallest diffs, the most faults.
    Pages,
    /// Always the block: the fewest faults, the largest diffs.
    Blocks,
    /// The page, until a block has taken this many faults since the last checkpoint: the next opens the rest of it.
    FaultLimit(u32),
    /// Whatever costs less, by what each block was seen to do.
    Cost(Costs),
}

impl Default for Policy {
    /// By the default [`Costs`].
    fn default() -> Self {
        Self::Cost(Costs::default())
    }
}

/// What a write fault costs, and what a byte costs that is written although it is clean.
///
/// # Examples
/// Measured at start-up, on the disk that snapshots go to:
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
    /// The time that the first write to a protected page takes longer than a write.
    pub fault: Duration,
    /// The time to write a MiB to the snapshot.
    pub mebibyte: Duration,
}

impl Default for Costs {
    /// [`Costs::DEFAULT`].
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Costs {
    /// 4.9 microseconds for a stage-2 fault through the Hypervisor framework (told by others, on Apple silicon), 625 microseconds for
    /// a MiB (1,600 MiB/s: direct writes to a virtio disk).
    pub const DEFAULT: Self = Self {
        fault: Duration::from_nanos(4_900),
        mebibyte: Duration::from_micros(625),
    };

    /// Times `fault`, which makes one write to a protected page, and `write`, which writes to where snapshots go and says how many bytes;
    /// the medians of several calls of each.
    ///
    /// # Errors
    /// Whatever the first failing call says.
    pub fn measure<E>(
        mut fault: impl FnMut() -> Result<(), E>,
        mut write: impl FnMut() -> Result<u64, E>,
    ) -> Result<Self, E> {
        let fault = median(31, || {
            let start = Instant::now();
            fault().map(|()| start.elapsed())
        })?;
        let mebibyte = median(5, || {
            let start = Instant::now();
            let bytes = write()?;
            Ok(start
                .elapsed()
                .mul_f64(f64::from(1 << 20) / bytes.max(1) as f64))
        })?;
        Ok(Self { fault, mebibyte })
    }

    /// In nanoseconds: a fault, and writing `bytes`.
    pub(crate) fn in_nanos(self, bytes: u64) -> (i64, i64) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let write = (u128::from(nanos(self.mebibyte)) * u128::from(bytes)) >> 20;
        // Longer than an hour is for ever.
        let most = u64::pow(10, 9) * 3600;
        let signed = |nanos: u64| i64::try_from(nanos.min(most)).expect("at most an hour");
        (
            signed(nanos(self.fault)),
            signed(u64::try_from(write).unwrap_or(most)),
        )
    }
}

/// The median of an odd number of times.
fn median<E>(times: usize, mut once: impl FnMut() -> Result<Duration, E>) -> Result<Duration, E> {
    let mut all = (0..times).map(|_| once()).collect::<Result<Vec<_>, E>>()?;
    all.sort_unstable();
    Ok(all[times / 2])
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_in_order_of_size() {
        let mut times = [5, 1, 4, 2, 3].map(Duration::from_secs).into_iter();
        let median = median(5, || times.next().ok_or(()));
        assert_eq!(median, Ok(Duration::from_secs(3)));
    }

    #[test]
    fn costs_are_taken_as_they_are_up_to_an_hour() {
        let seconds = |fault, mebibyte| Costs {
            fault: Duration::from_secs(fault),
            mebibyte: Duration::from_secs(mebibyte),
        };
        assert_eq!(
            seconds(90, 4).in_nanos(1 << 18),
            (90_000_000_000, 1_000_000_000)
        );
        let hour = 3_600_000_000_000;
        assert_eq!(seconds(u64::MAX, u64::MAX).in_nanos(1 << 40), (hour, hour));
    }
}
