//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, counts and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::io;
use std::path::Path;

use crate::report::SweepReport;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "atomic_file", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports the staged file of a new writer.
pub(crate) fn staged(dest: &Path, staged: &Path, recycled: bool) {
    event!(debug, ?dest, ?staged, recycled, "file staged");
}

/// Reports why a recycled file is not reused. A new file is staged.
pub(crate) fn recycled_file_declined(path: &Path, why: &io::Error) {
    event!(info, ?path, because = %why, "the recycled file is not reused");
}

/// Reports why a replaced file does not become the recycled file.
pub(crate) fn old_file_not_kept(path: &Path, why: &io::Error) {
    event!(info, ?path, because = %why, "the replaced file is not recycled");
}

/// Reports what a sweep removed and what it kept.
pub(crate) fn swept(dir: &Path, report: &SweepReport) {
    let removed = report.removed.len() + report.recycled.len();
    for path in report.removed.iter().chain(&report.recycled) {
        event!(info, ?path, "orphaned file removed");
    }
    for path in &report.in_use {
        event!(debug, ?path, "staged file kept: a writer uses it");
    }
    for skipped in &report.skipped {
        let reason = &skipped.reason;
        event!(info, path = ?skipped.path, because = %reason, "staged file kept");
    }
    event!(
        debug,
        ?dir,
        removed,
        in_use = report.in_use.len(),
        "directory swept"
    );
}
