//! What the steps of a live snapshot share.

use std::sync::Arc;

use dirty_bitmap::TrackedEpoch;
use memory_writer::{CancelToken, MemoryWriter, SnapshotError};

use crate::capture::Capture;
use crate::error::LiveError;
use crate::frozen_ram::{FrozenRam, GuestMemory, check_cancelled};
use crate::options::Method;
use crate::order::Order;
use crate::pacer::{Paced, Pacer};
use crate::precopy::{PassError, Passes};
use crate::report::Report;
use crate::settings::{Kind, LiveSnapshotOptions};
use crate::slot::Attached;
use crate::tracker::LiveTracker;

/// The largest number of pages whose protection is left to the pause.
const FEW_PAGES: u64 = 256;

/// The largest number of rounds in which written pages are protected again before the pause.
const MAX_ROUNDS: u32 = 8;

/// What the steps of a snapshot share.
pub(super) struct Parts {
    // Dropped first: a write fault must not wait for a snapshot that is cancelled.
    pub(super) attached: Option<Attached>,
    pub(super) tracker: Arc<dyn LiveTracker>,
    pub(super) writer: MemoryWriter,
    pub(super) epoch: TrackedEpoch,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) kind: Kind,
    pub(super) cancel: CancelToken,
    pub(super) pacer: Pacer,
    pub(super) report: Report,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("writer", &self.writer)
            .field("report", &self.report)
            .finish_non_exhaustive()
    }
}

impl Parts {
    /// Returns the capture, if pages are written after the pause.
    pub(super) fn capture(&self) -> Option<Arc<Capture>> {
        match self.report.method {
            Method::StopAndCopy => None,
            Method::Auto | Method::PreCopy | Method::CopyOnWrite => {
                let attached = self.attached.as_ref();
                attached.map(|it| Arc::clone(&it.capture))
            }
        }
    }

    /// Protects the pages again that were written since the last round, until few are left.
    pub(super) fn protect_again(&mut self) -> Result<(), LiveError> {
        let mut last = u64::MAX;
        for _ in 0..MAX_ROUNDS {
            check_cancelled(&self.cancel)?;
            let dirty = self.tracker.bitmap().dirty_pages();
            if dirty <= FEW_PAGES || dirty > last / 2 {
                break;
            }
            last = dirty;
            let extended = self.tracker.extend_epoch(&mut self.epoch);
            let extension = extended.map_err(LiveError::Tracker)?;
            if let Some(attached) = &self.attached {
                extension.runs().for_each(|run| attached.capture.add(run));
            }
        }
        Ok(())
    }

    /// Adds the pages of the image to the capture: of a full image, those that may hold nonzero
    /// bytes. They are protected, so a page that is written from now on is added again.
    pub(super) fn add_to_capture(&mut self) -> Result<(), LiveError> {
        let Some(attached) = &self.attached else {
            return Ok(());
        };
        match self.kind {
            Kind::Diff => self
                .epoch
                .bitmap()
                .runs()
                .for_each(|run| attached.capture.add(run)),
            Kind::Full => {
                let ram_size = self.tracker.bitmap().ram_size();
                let reader = self.memory.reader();
                for run in reader.populated(0..ram_size) {
                    check_cancelled(&self.cancel)?;
                    attached.capture.add(run);
                }
            }
        }
        Ok(())
    }

    pub(super) fn precopy(&mut self, options: &LiveSnapshotOptions) -> Result<(), LiveError> {
        let reader = Paced::new(self.memory.reader(), &self.pacer, &self.cancel);
        let passes = Passes {
            tracker: &*self.tracker,
            writer: &mut self.writer,
            epoch: &mut self.epoch,
            reader: &reader,
            kind: self.kind,
            options,
        };
        let (passes, convergence) = passes.make().map_err(|error| match error {
            PassError::Write(error) => self.cause(error),
            PassError::Tracker(error) => error,
        })?;
        self.report.passes = passes;
        self.report.convergence = Some(convergence);
        Ok(())
    }

    /// Writes the image in the pause.
    pub(super) fn write_all(&mut self, kind: Kind) -> Result<(), LiveError> {
        let reader = self.memory.reader();
        let written = match kind {
            Kind::Full => self.writer.write_full(&*reader),
            Kind::Diff => {
                let dirty = self.epoch.bitmap();
                self.writer.write_diff(&*reader, dirty).map(drop)
            }
        };
        written.map_err(|error| self.cause(error))
    }

    /// Writes the pages of the last extension of the epoch in the pause.
    pub(super) fn write_last_pass(&mut self) -> Result<(), LiveError> {
        let reader = self.memory.reader();
        let written = match self.epoch.last_extension() {
            Some(dirtied) => self.writer.write_diff(&*reader, dirtied).map(drop),
            None => Ok(()),
        };
        written.map_err(|error| self.cause(error))
    }

    /// Writes the pages of the capture.
    pub(super) fn write_captured(&mut self, capture: &Arc<Capture>) -> Result<(), LiveError> {
        let frozen = FrozenRam::new(self.memory.reader(), capture, &self.pacer, &self.cancel);
        let ram_size = self.tracker.bitmap().ram_size();
        let order = Order::new(capture, ram_size);
        let (writer, epoch) = (&mut self.writer, &self.epoch);
        let written = match (self.report.method, self.kind) {
            (Method::PreCopy, _) => {
                let rest: Vec<_> = capture.needed(0..ram_size).collect();
                let written = writer.write_runs(&frozen, || rest.iter().cloned());
                // The earlier passes wrote the other pages, which have not changed since.
                written.and_then(|_| writer.count_as_written(epoch.bitmap()))
            }
            (_, Kind::Full) => writer.write_full_in_order(&frozen, order.find_zeros()),
            (_, Kind::Diff) => {
                let runs = order.data();
                writer
                    .write_diff_in_order(&frozen, epoch.bitmap(), runs)
                    .map(drop)
            }
        };
        written.map_err(|error| self.cause(error))
    }

    /// Checks that no page was discarded unseen since the snapshot began: such a page may have been
    /// written without a fault. All other pages of the image are written.
    pub(super) fn check_discarded(&self) -> Result<(), LiveError> {
        let marked = self.tracker.mark_discarded().map_err(LiveError::Tracker)?;
        if let Some(offset) = marked {
            return Err(LiveError::Discarded { offset });
        }
        // A fault may have found a page after the last read.
        let failed = self.attached.as_ref().and_then(|it| it.capture.failure());
        failed.and_then(LiveError::of_capture).map_or(Ok(()), Err)
    }

    /// Returns the cause of a failed write: the writer reports only that the reader has failed.
    pub(super) fn cause(&self, error: SnapshotError) -> LiveError {
        // A fault that waits for the pool would keep the tracker from its answer.
        if let Some(attached) = &self.attached {
            attached.capture.end();
        }
        // All pages lose their protection when faults are not handled any more.
        if let Err(untracked) = self.tracker.mark_discarded() {
            return LiveError::Tracker(untracked);
        }
        let failed = self.attached.as_ref().and_then(|it| it.capture.failure());
        let of_capture = failed.and_then(LiveError::of_capture);
        let cancelled = || self.cancel.is_cancelled().then_some(LiveError::Cancelled);
        of_capture
            .or_else(cancelled)
            .unwrap_or(LiveError::Write(error))
    }
}
