//! How a file system treats holes and punching.

/// Whether ranges that were never written take space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HoleSupport {
    /// Only written ranges are stored.
    Sparse,
    /// Everything up to the file's length is stored: HFS+, exFAT.
    Dense,
    /// The file system reports no holes, and an impossible allocation: the Linux driver of APFS
    /// reports 0 for all files.
    Unknown,
}

/// Whether `SEEK_HOLE` and `SEEK_DATA` are reliable for synced data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SeekHole {
    /// Holes and data of a synced file are reported correctly.
    Exact {
        /// The smallest hole in bytes: a written byte turns at most this much into data, and gaps
        /// of this size between data are kept.
        granularity: u64,
    },
    /// Everything is reported as data. This is safe, but provides no information.
    AllData,
    /// The calls fail.
    Unsupported,
    /// Written and synced bytes were reported as a hole: do not use the reports.
    Unreliable,
}

/// The report of `SEEK_HOLE` for zeros that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WrittenZeros {
    /// They are reported as data.
    Data,
    /// They are reported as a hole: file systems that compress may store no block of zeros (ZFS). A
    /// page of zeros that was written is not distinguishable from one that was not.
    Hole,
    /// `SEEK_HOLE` provides no information.
    Unknown,
}

/// The effect of punching a hole into data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Punch {
    /// The range reads as zeros, and its space was found to be free.
    Frees,
    /// The range reads as zeros. Whether space was freed is unknown.
    Zeroes,
    /// The call fails: write zeros instead.
    Unsupported,
}
