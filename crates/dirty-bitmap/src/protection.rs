//! The interface between a tracker and the platform.

use std::error::Error;
use std::ops::Range;

/// Write protection of guest memory, such as stage 2 of a hypervisor, userfaultfd or `mprotect`.
///
/// Ranges are addresses in the address space of the tracker's bitmap, aligned to its page size.
/// Both methods may be called by many threads at once, also for ranges that overlap.
pub trait WriteProtection {
    /// The error of a failed call.
    type Error: Error + Send + Sync + 'static;

    /// Write-protects every page of `range`.
    ///
    /// Once this returns, the next write to each of these pages faults, on every vCPU. A page that
    /// is already protected stays protected.
    ///
    /// Discarding a page (`MADV_DONTNEED`, `MADV_REMOVE`, a hole in its file) may remove its
    /// protection: userfaultfd's is removed, and that of stage 2 or `mprotect` is not. The VMM
    /// marks each page after it was discarded, see
    /// [`WriteTracker`](crate::WriteTracker#discarded-pages).
    ///
    /// # Errors
    /// After an error, any part of `range` may be protected.
    fn protect(&self, range: Range<u64>) -> Result<(), Self::Error>;

    /// Returns whether clean pages may be protected again together with dirty ones around them,
    /// which takes fewer calls. The provided method returns `true`: clean pages are protected, so
    /// it changes nothing.
    ///
    /// Where a discard removes the protection, a discarded page that is not marked is protected by
    /// this, and its discard can not be noticed any more. A platform that looks for such pages
    /// returns `false`.
    fn may_bridge(&self) -> bool {
        true
    }

    /// Unprotects `range`, which allows writes to it.
    ///
    /// A write that waits in its fault must keep waiting. The caller of
    /// [`WriteTracker::on_write_fault`](crate::WriteTracker::on_write_fault) resumes it after that
    /// method has returned.
    ///
    /// # Errors
    /// After an error, any part of `range` may be unprotected.
    fn unprotect(&self, range: Range<u64>) -> Result<(), Self::Error>;
}
