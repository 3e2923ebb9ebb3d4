//! The events of this crate. Without the feature `tracing`, these functions do nothing.
//!
//! Events contain sizes, counts and reasons, and never bytes of memory.
#![cfg_attr(not(feature = "tracing"), allow(unused_variables))]

use crate::error::LazyError;
use crate::fault_handler::PageFaultHandler;
use crate::pages::Pages;

#[cfg(feature = "tracing")]
macro_rules! event {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: "lazy_restore", $($event)+) };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($event:tt)+) => {};
}

/// Reports that filling begins.
pub(crate) fn started(pages: &Pages, prefetch: bool) {
    let memory_size = pages.memory_size();
    event!(debug, memory_size, prefetch, "filling begins");
}

/// Reports the totals once all pages are in memory.
pub(crate) fn filled(pages: &Pages, handler: &PageFaultHandler) {
    if !pages.status().is_finished() {
        return;
    }
    let (faults, bytes_by_faults) = (handler.faults(), pages.loaded_by_faults());
    let bytes_by_prefetch = pages.loaded().saturating_sub(bytes_by_faults);
    let elapsed = pages.elapsed();
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
pub(crate) fn failed(error: &LazyError) {
    event!(warn, because = %error, "filling has failed");
}
