//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain offsets, sizes and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::error::Error;
use std::fmt::{Debug, Display};

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "sparse_file", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports which engine writes, and why no faster one does.
pub(crate) fn engine_chosen(engine: &dyn Debug, because: &dyn Display, is_fallback: bool) {
    if is_fallback {
        event!(info, ?engine, %because, "a slower engine is used");
    } else {
        event!(debug, ?engine, %because, "engine chosen");
    }
}

/// Reports that a requested engine writes through the page cache.
pub(crate) fn direct_io_refused(why: &dyn Error) {
    event!(info, error = %why, "direct I/O is not available: writing through the page cache");
}

/// Reports the first direct write of a call that the file system refused.
pub(crate) fn direct_write_refused(offset: u64, why: &dyn Error) {
    event!(info,
        offset = format_args!("{offset:#x}"),
        error = %why,
        "the file system refused a direct write: writing such ranges through the page cache"
    );
}

/// Reports that the holes of a file are read as data.
pub(crate) fn holes_not_used(why: &dyn Error) {
    event!(info, because = %why, "holes are not trusted: the whole file is read as data");
}

/// Reports that the rest of a listing is data.
pub(crate) fn rest_is_data(offset: u64, source: &dyn Debug) {
    event!(debug,
        offset = format_args!("{offset:#x}"),
        because = ?source,
        "holes are not listed any more: the rest of the file is read as data"
    );
}
