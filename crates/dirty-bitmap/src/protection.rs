//! What a tracker needs of the platform.

use std::error::Error;
use std::ops::Range;

/// Write protection of guest memory: stage 2 of a hypervisor, userfaultfd, `mprotect`.
///
/// Ranges are addresses as the tracker's bitmap has them, aligned to its page size. Both calls may come from many threads at once, and
/// for ranges that overlap.
pub trait WriteProtection {
    /// Why a call failed.
    type Error: Error + Send + Sync + 'static;

    /// Makes the next write to every page of `range` fault, on every vCPU, before it returns. Where a page is protected already,
    /// nothing changes.
    ///
    /// # Errors
    /// Part of `range` may be protected then and part not.
    fn protect(&self, range: Range<u64>) -> Result<(), Self::Error>;

    /// Lets writes to `range` through. A write that waits in its fault must go on waiting: whoever called
    /// [`WriteTracker::on_write_fault`](crate::WriteTracker::on_write_fault) lets it go on once that has returned.
    ///
    /// # Errors
    /// Part of `range` may be writable then and part not.
    fn lift(&self, range: Range<u64>) -> Result<(), Self::Error>;
}
