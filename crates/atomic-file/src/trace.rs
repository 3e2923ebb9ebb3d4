//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, counts and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::error::Error;
use std::path::Path;

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
pub(crate) fn recycled_file_declined(path: &Path, why: &dyn Error) {
    event!(info, ?path, because = %why, "the recycled file is not reused");
}

/// Reports why a replaced file does not become the recycled file.
pub(crate) fn old_file_not_kept(path: &Path, why: &dyn Error) {
    event!(info, ?path, because = %why, "the replaced file is not recycled");
}

/// Reports an orphaned file that a sweep removed.
pub(crate) fn orphan_removed(path: &Path) {
    event!(info, ?path, "orphaned file removed");
}

/// Reports a staged file that a sweep kept because a writer uses it.
pub(crate) fn kept_in_use(path: &Path) {
    event!(debug, ?path, "staged file kept: a writer uses it");
}

/// Reports a staged file that a sweep kept for another reason.
pub(crate) fn kept(path: &Path, why: &dyn Error) {
    event!(info, ?path, because = %why, "staged file kept");
}

/// Reports the totals of a sweep.
pub(crate) fn swept(dir: &Path, removed: usize, in_use: usize) {
    event!(debug, ?dir, removed, in_use, "directory swept");
}
