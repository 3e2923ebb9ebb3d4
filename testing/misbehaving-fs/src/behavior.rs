//! How the file system misbehaves.

/// The results of `SEEK_HOLE` and `SEEK_DATA`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lseek {
    /// Those of the underlying file. Data that was written through a mapping or to the writeback
    /// cache is missing there, because the kernel does not write it back before it sends the
    /// request.
    #[default]
    Exact,
    /// The whole file is a hole: `SEEK_HOLE` returns the offset, `SEEK_DATA` fails with `ENXIO`.
    AllHole,
    /// `SEEK_HOLE` fails with `ENXIO` inside the file, like on APFS for clones.
    HoleIsEnxio,
    /// `SEEK_DATA` fails with `ENXIO` although there is data.
    DataIsEnxio,
}

/// The results of reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// All requested bytes.
    #[default]
    Whole,
    /// At most 1,000 bytes. Bypasses the page cache.
    Short,
    /// `EIO` if the read includes the byte at this offset. Bypasses the page cache.
    FailAt(u64),
}

/// The behavior of the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behavior {
    /// The results of `SEEK_HOLE` and `SEEK_DATA`.
    pub lseek: Lseek,
    /// The results of reads, for files that are opened from now on.
    pub reads: Reads,
    /// Whether the kernel caches writes until it writes them back. Determined when the file system
    /// is mounted.
    pub writeback_cache: bool,
}
