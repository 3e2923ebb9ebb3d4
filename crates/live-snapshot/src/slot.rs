//! The place where a capture receives the write faults of a guest.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use dirty_bitmap::WriteProtection;

use crate::capture::Capture;

/// The place of at most one capture, which copies pages before they are overwritten.
#[derive(Clone, Default)]
pub struct CaptureSlot(Arc<RwLock<Option<Arc<Capture>>>>);

impl fmt::Debug for CaptureSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptureSlot")
            .field("in_use", &self.current().is_some())
            .finish()
    }
}

impl CaptureSlot {
    /// Copies the pages of `range`, offsets in the memory file, that a snapshot in progress needs.
    ///
    /// Call it before a write that does not fault. With userfaultfd every write faults. With
    /// Apple's Hypervisor framework, writes of the host and of its devices do not. May wait for
    /// the file that is being written.
    pub fn before_write(&self, range: Range<u64>) {
        // The lock is not held during the copy, which may wait.
        if let Some(capture) = self.current() {
            capture.save(range);
        }
    }

    /// Copies pages like [`before_write`](Self::before_write), and returns the capture. The caller
    /// looks for [discarded](Capture::check_discarded) pages.
    #[cfg(target_os = "linux")]
    pub(crate) fn copy_pages(&self, range: Range<u64>) -> Option<Arc<Capture>> {
        let capture = self.current()?;
        capture.save_pages(range);
        Some(capture)
    }

    /// Returns whether a snapshot writes all of the RAM in the pause.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_held(&self) -> bool {
        self.current().is_some_and(|it| it.is_held())
    }

    /// Waits while a snapshot writes all of the RAM in the pause.
    #[cfg(target_os = "linux")]
    pub(crate) fn wait_while_held(&self) {
        if let Some(capture) = self.current() {
            capture.wait_while_held();
        }
    }

    fn current(&self) -> Option<Arc<Capture>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Puts a capture here, unless there is one.
    pub(crate) fn attach(&self, capture: &Arc<Capture>) -> Option<Attached> {
        let mut place = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if place.is_some() {
            return None;
        }
        *place = Some(Arc::clone(capture));
        drop(place);
        Some(Attached {
            slot: self.clone(),
            capture: Arc::clone(capture),
        })
    }
}

/// A capture in its slot. Dropping it ends the capture.
#[derive(Debug)]
pub(crate) struct Attached {
    slot: CaptureSlot,
    pub(crate) capture: Arc<Capture>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.capture.end();
        *self.slot.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A write protection that copies pages before it unprotects them.
///
/// Pass it as the protection of a `WriteTracker` or `Stage2Tracker`, in place of `P`.
#[derive(Debug)]
pub struct CopyOnWrite<P> {
    protection: P,
    slot: CaptureSlot,
}

impl<P> CopyOnWrite<P> {
    /// Creates a write protection by `protection`.
    pub fn new(protection: P) -> Self {
        Self {
            protection,
            slot: CaptureSlot::default(),
        }
    }

    /// Returns the inner write protection.
    pub fn protection(&self) -> &P {
        &self.protection
    }

    /// Returns the place of a capture.
    pub fn slot(&self) -> &CaptureSlot {
        &self.slot
    }
}

impl<P: WriteProtection> WriteProtection for CopyOnWrite<P> {
    type Error = P::Error;

    fn protect(&self, range: Range<u64>) -> Result<(), P::Error> {
        self.protection.protect(range)
    }

    fn may_bridge(&self) -> bool {
        self.protection.may_bridge()
    }

    fn unprotect(&self, range: Range<u64>) -> Result<(), P::Error> {
        self.slot.before_write(range.clone());
        self.protection.unprotect(range)
    }
}
