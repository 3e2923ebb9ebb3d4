//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, sizes and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::error::Error;
use std::path::Path;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "memory_image", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports an image that was added to a chain.
pub(crate) fn image_added(layer: usize, path: &Path, ram_size: u64, sealed: bool) {
    event!(
        debug,
        ?path,
        layer,
        ram_size,
        sealed,
        "image added to the chain"
    );
}

/// Reports that the caller trusts the holes of a diff although this crate does not.
pub(crate) fn holes_not_trusted(path: &Path, why: &dyn Error) {
    event!(info, ?path, because = %why, "holes are not trusted, and are taken for clean pages");
}

/// Reports how many bytes of a mapped chain were copied.
pub(crate) fn mapped(mapped: u64, copied: u64) {
    if copied == 0 {
        event!(debug, mapped, copied, "chain mapped");
    } else {
        event!(info, mapped, copied, "chain mapped: short runs were copied");
    }
}
