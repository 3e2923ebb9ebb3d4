//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, sizes and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::path::Path;

use image_format::Layout;
use sparse_file::SpaceError;

use crate::error::WriteAmbiguity;
use crate::geometry::Geometry;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "memory_writer", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports a new writer.
pub(crate) fn opened(dest: &Path, layout: Layout, geometry: Geometry, recycled: bool) {
    let Geometry {
        ram_size,
        page_size,
    } = geometry;
    event!(debug, ?dest, %layout, ram_size, page_size, recycled, "snapshot staged");
}

/// Reports why a raw image is copied.
pub(crate) fn blocks_not_shared(dest: &Path, why: &SpaceError) {
    event!(info, ?dest, because = %why, "the file system does not share blocks: copying the image");
}

/// Reports that the holes of a raw diff show its pages only after a sync.
pub(crate) fn synced_for_holes(why: &WriteAmbiguity) {
    event!(debug, because = %why, "the holes do not show the written pages yet: syncing the file");
}

/// Reports that the holes of a raw diff do not show its pages.
pub(crate) fn holes_not_trusted(why: &WriteAmbiguity) {
    event!(info, because = %why, "holes are not trusted: the raw diff is refused");
}
