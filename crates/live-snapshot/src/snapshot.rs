//! The steps of a live snapshot: begin, freeze, write, commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dirty_bitmap::TrackedEpoch;
use memory_writer::MemoryWriter;

use crate::capture::Capture;
use crate::error::LiveError;
use crate::frozen_ram::{GuestMemory, check_cancelled};
use crate::options::Method;
use crate::pacer::Pacer;
use crate::report::Report;
use crate::settings::{Kind, LiveSnapshotOptions};
use crate::slot::Attached;
use crate::tracker::LiveTracker;

mod parts;

use parts::Parts;

/// A live snapshot that is prepared: the VMM may pause the guest now.
///
/// Dropping it at any time cancels the snapshot: nothing is committed, all marks return to the
/// bitmap, and the guest is unharmed.
#[derive(Debug)]
#[must_use = "a live snapshot that is dropped is cancelled"]
pub struct LiveSnapshot {
    parts: Parts,
}

/// A live snapshot whose point in time is set: the VMM may resume the guest now.
///
/// Write it soon: once the pool is full, writes of the guest wait until pages are written to the
/// file. It is `Send`: another thread may write it. That thread must not write the guest's RAM or
/// wait for the guest, because it would wait for itself. Dropping the value cancels the snapshot.
#[derive(Debug)]
#[must_use = "a live snapshot that is dropped is cancelled: call `commit`"]
pub struct Frozen {
    parts: Parts,
    resumed: Instant,
}

/// A live snapshot whose pages are all written, and not committed.
#[derive(Debug)]
#[must_use = "a live snapshot that is dropped is cancelled: call `commit`"]
pub struct Written {
    writer: MemoryWriter,
    epoch: TrackedEpoch,
    report: Report,
}

impl LiveSnapshotOptions {
    /// Begins a snapshot of the guest of `tracker` while the guest runs, and returns when the guest
    /// should be paused.
    ///
    /// Copy-on-write and stop-and-copy protect all of the RAM here, so that
    /// [`freeze`](LiveSnapshot::freeze) only protects the pages that were written since. This takes
    /// about 16 ms for each GiB at the first snapshot. Later it takes as long to look for pages
    /// that were discarded unseen, and longer the more pages were written since the last one.
    /// Pre-copy writes all of the RAM here.
    ///
    /// # Errors
    /// Returns [`LiveError`]. Nothing changed, except that pages may be protected.
    pub fn begin<T: LiveTracker>(
        &self,
        tracker: &Arc<T>,
        writer: MemoryWriter,
    ) -> Result<LiveSnapshot, LiveError> {
        self.begin_of(&(Arc::clone(tracker) as _), writer)
    }

    fn begin_of(
        &self,
        tracker: &Arc<dyn LiveTracker>,
        writer: MemoryWriter,
    ) -> Result<LiveSnapshot, LiveError> {
        let began = Instant::now();
        let bitmap = tracker.bitmap();
        let (ram_size, page_size) = (bitmap.ram_size(), bitmap.page_size());
        self.check(&writer, ram_size, page_size)?;
        let method = match (self.method, tracker.slot()) {
            (Method::Auto | Method::CopyOnWrite, Some(_)) => Method::CopyOnWrite,
            (Method::Auto, None) => Method::PreCopy,
            (Method::CopyOnWrite, None) => return Err(LiveError::NoCopyOnWrite),
            (method @ (Method::PreCopy | Method::StopAndCopy), _) => method,
        };
        let memory = Arc::new(GuestMemory::new(tracker));
        match self.kind {
            Kind::Full => writer.preflight_full(&*memory.reader(), &**bitmap)?,
            Kind::Diff => writer.preflight_diff(&*memory.reader(), &**bitmap)?,
        }
        let attached = match (method, tracker.slot()) {
            // Stop-and-copy only takes the place: two snapshots would hide discards from each
            // other.
            (_, Some(slot)) => {
                let pool_pages = usize::try_from(self.pool / page_size).unwrap_or(usize::MAX);
                let capture = Arc::new(Capture::new(
                    Arc::clone(&memory) as _,
                    ram_size,
                    page_size,
                    pool_pages,
                    self.when_pool_full,
                ));
                Some(slot.attach(&capture).ok_or(LiveError::InProgress)?)
            }
            (_, None) => None,
        };
        tracker.mark_discarded().map_err(LiveError::Tracker)?;
        let epoch = tracker.begin_epoch().map_err(LiveError::Tracker)?;
        let mut parts = Parts {
            attached,
            tracker: Arc::clone(tracker),
            writer,
            epoch,
            memory,
            kind: self.kind,
            cancel: self.cancel.clone(),
            pacer: Pacer::new(self.rate_limit),
            report: Report::of(method),
        };
        check_cancelled(&parts.cancel)?;
        match method {
            Method::PreCopy => parts.precopy(self)?,
            Method::CopyOnWrite => parts.add_to_capture()?,
            Method::StopAndCopy | Method::Auto => {}
        }
        if method != Method::PreCopy || parts.attached.is_some() {
            parts.protect_again()?;
        }
        parts.report.prepared_in = began.elapsed();
        Ok(LiveSnapshot { parts })
    }

    fn check(&self, writer: &MemoryWriter, ram: u64, page_size: u64) -> Result<(), LiveError> {
        if writer.ram_size() != ram {
            return Err(LiveError::Size {
                writer: writer.ram_size(),
                guest: ram,
            });
        }
        if writer.page_size() > page_size {
            return Err(LiveError::PageSize {
                image: writer.page_size(),
                tracked: page_size,
            });
        }
        if self.pool < page_size * 2 {
            return Err(LiveError::PoolTooSmall {
                pool: self.pool,
                page_size,
            });
        }
        Ok(())
    }
}

impl LiveSnapshot {
    /// Returns options for a live snapshot.
    pub fn options() -> LiveSnapshotOptions {
        LiveSnapshotOptions::default()
    }

    /// Sets the point in time of the snapshot. Call it while the vCPUs are stopped, and all writes
    /// of devices to the RAM are complete or wait.
    ///
    /// With copy-on-write it protects the pages that were written since the snapshot began, and
    /// returns at once. The guest may resume when it has returned.
    ///
    /// # Errors
    /// Returns [`LiveError`]. The snapshot is cancelled, and the guest may resume.
    pub fn freeze(self) -> Result<Frozen, LiveError> {
        let mut parts = self.parts;
        check_cancelled(&parts.cancel)?;
        let began = Instant::now();
        let capture = parts.capture();
        let (kind, precopied) = (parts.kind, !parts.report.passes.is_empty());
        let place = parts.attached.as_ref().map(|it| Arc::clone(&it.capture));
        let mut protected = 0;
        let mut frozen = |dirtied: &dirty_bitmap::Extension<'_>| {
            protected = dirtied.dirty_pages() * dirtied.page_size();
            if let Some(capture) = &capture {
                dirtied.runs().for_each(|run| capture.add(run));
                capture.activate();
            } else if let Some(place) = &place {
                place.set_held(true);
            }
        };
        let epoch = &mut parts.epoch;
        let extended = parts.tracker.freeze_epoch(epoch, &mut frozen);
        extended.map_err(LiveError::Tracker)?;
        parts.report.protected_in_pause = protected;
        if capture.is_none() {
            match precopied {
                true => parts.write_last_pass()?,
                false => parts.write_all(kind)?,
            }
        }
        if let Some(place) = &place {
            place.set_held(false);
        }
        let resumed = Instant::now();
        parts.report.freeze = resumed - began;
        Ok(Frozen { parts, resumed })
    }
}

impl Frozen {
    /// Stores bytes in the image, such as the state of the vCPUs and devices at the point in time
    /// of the snapshot. See [`MemoryWriter::set_metadata`].
    ///
    /// # Errors
    /// Returns the errors of [`MemoryWriter::set_metadata`]. The snapshot can go on.
    pub fn set_metadata(&mut self, bytes: impl Into<Vec<u8>>) -> Result<(), LiveError> {
        Ok(self.parts.writer.set_metadata(bytes)?)
    }

    /// Writes the pages that are not written yet, while the guest runs.
    ///
    /// # Errors
    /// Returns [`LiveError`]. The snapshot is cancelled.
    pub fn write(self) -> Result<Written, LiveError> {
        let Self { mut parts, resumed } = self;
        let written = match parts.capture() {
            None => Ok(()),
            Some(capture) => parts.write_captured(&capture),
        };
        if let Some(Attached { capture, .. }) = &parts.attached {
            let usage = capture.usage();
            let page_size = parts.tracker.bitmap().page_size();
            parts.report.copied_before_write = usage.copied * page_size;
            parts.report.pool_peak = usage.peak * page_size;
            parts.report.pool_waits = usage.waits;
            parts.report.pool_waited = usage.waited;
        }
        written?;
        parts.check_discarded()?;
        check_cancelled(&parts.cancel)?;
        parts.report.written_in = resumed.elapsed();
        let Parts {
            attached,
            writer,
            epoch,
            report,
            ..
        } = parts;
        drop(attached);
        Ok(Written {
            writer,
            epoch,
            report,
        })
    }

    /// Writes as [`write`](Self::write) does, and commits the image.
    ///
    /// # Errors
    /// Returns [`LiveError`]. An error of the commit states what is at the destination.
    pub fn commit(self) -> Result<Report, LiveError> {
        self.write()?.commit()
    }
}

impl Written {
    /// Commits the image, and releases the marks of its epoch: see
    /// [`MemoryWriter::commit_and_release`].
    ///
    /// # Errors
    /// Returns the errors of [`MemoryWriter::commit_and_release`].
    pub fn commit(self) -> Result<Report, LiveError> {
        self.writer.commit_and_release(self.epoch)?;
        Ok(self.report)
    }

    /// Returns the writer and the epoch, for a commit as part of a group: see
    /// [`MemoryWriter::check_epoch`].
    pub fn into_parts(self) -> (MemoryWriter, TrackedEpoch, Report) {
        (self.writer, self.epoch, self.report)
    }

    /// Returns what the snapshot did so far.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

impl Report {
    fn of(method: Method) -> Self {
        Self {
            method,
            prepared_in: Duration::ZERO,
            passes: Vec::new(),
            convergence: None,
            freeze: Duration::ZERO,
            protected_in_pause: 0,
            written_in: Duration::ZERO,
            copied_before_write: 0,
            pool_peak: 0,
            pool_waits: 0,
            pool_waited: Duration::ZERO,
        }
    }
}
