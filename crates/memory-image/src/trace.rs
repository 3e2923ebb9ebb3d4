//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain paths, sizes and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use crate::error::ReadAmbiguity;
use crate::image::Image;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "memory_image", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports an image that was added to a chain.
pub(crate) fn image_added(layer: usize, image: &Image) {
    let (path, ram_size) = (image.path(), image.ram_size());
    let sealed = image.footer().is_some();
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
pub(crate) fn holes_not_trusted(image: &Image, why: &ReadAmbiguity) {
    let path = image.path();
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
