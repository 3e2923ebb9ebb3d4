//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, sizes and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::error::Error;
use std::path::Path;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "memory_writer", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports a new writer.
pub(crate) fn opened(dest: &Path, layout: &str, ram_size: u64, page_size: u64, recycled: bool) {
    event!(debug, ?dest, %layout, ram_size, page_size, recycled, "snapshot staged");
}

/// Reports why a raw image is copied.
pub(crate) fn blocks_not_shared(dest: &Path, why: &dyn Error) {
    event!(info, ?dest, because = %why, "the file system does not share blocks: copying the image");
}

/// Reports that the holes of a raw diff show its pages only after a sync.
pub(crate) fn synced_for_holes(why: &dyn Error) {
    event!(debug, because = %why, "the holes do not show the written pages yet: syncing the file");
}

/// Reports that the holes of a raw diff do not show its pages.
pub(crate) fn holes_not_trusted(why: &dyn Error) {
    event!(info, because = %why, "holes are not trusted: the raw diff is refused");
}
