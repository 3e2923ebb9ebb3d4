//! The thread that handles write faults.

use std::io::{self, PipeReader};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};

use dirty_bitmap::WriteTracker;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{Event, FaultFlags};

use super::protection::UffdProtection;
use crate::slot::CopyOnWrite;

/// What the handler and the tracker share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tracker: WriteTracker,
    pub(super) protection: CopyOnWrite<UffdProtection>,
    /// Held for reading while a fault is handled, and for writing at the point in time of a
    /// snapshot: a page that was unprotected and is not marked yet would stay writable.
    pub(super) faults: RwLock<()>,
    /// The reason why faults are not handled any more.
    pub(super) failed: Mutex<Option<Arc<io::Error>>>,
}

impl Shared {
    /// Waits until no fault is being handled, and until the result is dropped.
    pub(super) fn no_faults(&self) -> RwLockWriteGuard<'_, ()> {
        self.faults.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles faults until `closed` hangs up.
    pub(super) fn handle_faults(&self, closed: &PipeReader) {
        if let Err(error) = self.until_closed(closed) {
            let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert_with(|| Arc::new(error));
            drop(failed);
            // Later writes would wait forever. They are not tracked, and no epoch begins any more.
            let _ = self.protection.protection().unregister();
        }
    }

    fn until_closed(&self, closed: &PipeReader) -> io::Result<()> {
        let fault = self.protection.protection().fault();
        let mut events = Vec::new();
        loop {
            let mut ready = [
                PollFd::new(fault.as_fd(), PollFlags::POLLIN),
                PollFd::new(closed.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                polled => _ = polled?,
            }
            fault.read_events(&mut events)?;
            if events.is_empty() && ready[1].any() == Some(true) {
                return Ok(());
            }
            for event in events.drain(..) {
                self.handle(&event)?;
            }
        }
    }

    /// Handles a fault: copies the page if a snapshot needs it, unprotects it, marks it, and lets
    /// the write continue.
    fn handle(&self, event: &Event) -> io::Result<()> {
        let address = match event {
            Event::PageFault { address, flags, .. }
                if flags.contains(FaultFlags::WRITE_PROTECT) =>
            {
                *address
            }
            other => return Err(io::Error::other(format!("unexpected event {other:?}"))),
        };
        let protection = self.protection.protection();
        let offset = protection.offset_of(address).ok_or_else(|| {
            io::Error::other(format!("a write fault at {address:#x}, which is not RAM"))
        })?;
        let handled = self.faults.read().unwrap_or_else(PoisonError::into_inner);
        let unprotected = self
            .tracker
            .on_write_fault(offset, &self.protection)
            .map_err(io::Error::other)?;
        drop(handled);
        protection.wake(unprotected)
    }
}
