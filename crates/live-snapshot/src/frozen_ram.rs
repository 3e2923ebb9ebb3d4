//! The RAM of one point in time, as a page reader.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use memory_writer::CancelToken;
use page_reader::{PageReader, RamLayout};

use crate::capture::{Capture, Failure, PageMemory};
use crate::error::LiveError;
use crate::pacer::Pacer;
use crate::tracker::LiveTracker;

/// The RAM of a tracker's guest.
pub(crate) struct GuestMemory {
    /// Weak: the thread that handles faults may have the last reference to this, and the drop of a
    /// tracker waits for that thread.
    tracker: Weak<dyn LiveTracker>,
    reader: Arc<dyn PageReader + Send + Sync>,
}

impl GuestMemory {
    pub(crate) fn new(tracker: &Arc<dyn LiveTracker>) -> Self {
        Self {
            tracker: Arc::downgrade(tracker),
            reader: tracker.memory(),
        }
    }

    fn tracker(&self) -> io::Result<Arc<dyn LiveTracker>> {
        let tracker = self.tracker.upgrade();
        tracker.ok_or_else(|| io::Error::other("the tracker of the guest was dropped"))
    }

    pub(crate) fn reader(&self) -> Arc<dyn PageReader + Send + Sync> {
        Arc::clone(&self.reader)
    }
}

impl PageMemory for GuestMemory {
    fn copy(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reader.read_at(offset, buf)
    }

    fn is_protected(&self, range: Range<u64>) -> io::Result<bool> {
        self.tracker()?.is_protected(range)
    }

    fn find_discarded(&self, range: Range<u64>) -> io::Result<Option<u64>> {
        self.tracker()?.find_discarded(range)
    }
}

/// The bytes of a capture. Each byte is read once.
pub(crate) struct FrozenRam<'f> {
    reader: Arc<dyn PageReader + Send + Sync>,
    capture: &'f Capture,
    pacer: &'f Pacer,
    cancel: &'f CancelToken,
}

impl<'f> FrozenRam<'f> {
    pub(crate) fn new(
        reader: Arc<dyn PageReader + Send + Sync>,
        capture: &'f Capture,
        pacer: &'f Pacer,
        cancel: &'f CancelToken,
    ) -> Self {
        Self {
            reader,
            capture,
            pacer,
            cancel,
        }
    }
}

impl PageReader for FrozenRam<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.pacer.wait(buf.len(), self.cancel)?;
        self.capture
            .read(offset, buf)
            .map_err(|failure| match failure {
                Failure::Memory { error, .. } => io::Error::new(error.kind(), error),
                Failure::Discarded { .. } => io::Error::other("the page was discarded"),
                Failure::PoolFull => io::Error::other("the pool is full"),
                Failure::NotPending { offset } => io::Error::other(format!(
                    "the page at offset {offset:#x} is not in the snapshot, or was read before"
                )),
                Failure::Ended => io::Error::other("the live snapshot has ended"),
            })
    }

    fn check_source(&self) -> io::Result<()> {
        self.reader.check_source()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.reader.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        self.reader.known_size()
    }
}

/// Returns an error if the token is cancelled.
pub(crate) fn check_cancelled(cancel: &CancelToken) -> Result<(), LiveError> {
    match cancel.is_cancelled() {
        true => Err(LiveError::Cancelled),
        false => Ok(()),
    }
}
