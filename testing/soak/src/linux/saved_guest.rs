//! A guest that is saved: it is stopped, but for the time that other work takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guests::guest::{Ram, Tracker};

/// A guest whose writes are tracked.
pub(super) trait SavedGuest {
    fn ram(&self) -> Ram;

    fn tracker(&self) -> Arc<dyn Tracker>;

    /// Runs the guest during `work`, and then stops it at an arbitrary instruction.
    fn run(&mut self, work: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<()>;

    /// Returns the error that the guest itself found in its memory.
    fn fault(&mut self) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
}

/// Says that the work is done, also where it panics.
pub(super) struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
