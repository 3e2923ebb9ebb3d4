//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain sizes, counts and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use std::error::Error;
use std::time::Duration;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "lazy_restore", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports that filling begins.
pub(crate) fn started(memory_size: u64, prefetch: bool) {
    event!(debug, memory_size, prefetch, "filling begins");
}

/// Reports the totals once all pages are in memory.
pub(crate) fn filled(faults: u64, bytes_by_faults: u64, bytes_by_prefetch: u64, elapsed: Duration) {
    event!(
        info,
        faults,
        bytes_by_faults,
        bytes_by_prefetch,
        ?elapsed,
        "all pages are in memory"
    );
}

/// Reports the first error of filling.
pub(crate) fn failed(error: &dyn Error) {
    event!(warn, because = %error, "filling has failed");
}
