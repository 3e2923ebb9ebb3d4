//! The passes of pre-copy.

use std::time::{Duration, Instant};

use dirty_bitmap::TrackedEpoch;
use memory_writer::{MemoryWriter, SnapshotError};
use page_reader::PageReader;

use crate::error::LiveError;
use crate::report::{Convergence, PreCopyPass, StopReason};
use crate::settings::{Kind, LiveSnapshotOptions};
use crate::tracker::LiveTracker;

/// A pass that leaves more than this part of the dirty bytes of the pass before does not shrink
/// the remainder.
const SHRINKING: f64 = 0.95;

/// The number of passes in a row that do not shrink the remainder, after which pre-copy ends.
const MAX_STALLED: u32 = 2;

/// What the passes write.
pub(crate) struct Passes<'p, R> {
    pub(crate) tracker: &'p dyn LiveTracker,
    pub(crate) writer: &'p mut MemoryWriter,
    pub(crate) epoch: &'p mut TrackedEpoch,
    pub(crate) reader: &'p R,
    pub(crate) kind: Kind,
    pub(crate) options: &'p LiveSnapshotOptions,
}

/// An error of a pass.
pub(crate) enum PassError {
    Write(SnapshotError),
    Tracker(LiveError),
}

impl From<SnapshotError> for PassError {
    fn from(error: SnapshotError) -> Self {
        Self::Write(error)
    }
}

impl<R: PageReader> Passes<'_, R> {
    /// Writes all pages, and then those that were dirtied meanwhile, until few are left or they do
    /// not become fewer.
    pub(crate) fn make(mut self) -> Result<(Vec<PreCopyPass>, Convergence), PassError> {
        let mut passes: Vec<PreCopyPass> = Vec::new();
        let mut stalled = 0;
        loop {
            let began = Instant::now();
            let written = self.write(passes.is_empty())?;
            let bitmap = self.tracker.bitmap();
            let pass = PreCopyPass {
                written,
                took: began.elapsed(),
                dirtied: bitmap.dirty_pages() * bitmap.page_size(),
            };
            let before = passes.last().map_or(u64::MAX, |last| last.dirtied);
            stalled = match pass.dirtied as f64 > before as f64 * SHRINKING {
                true => stalled + 1,
                false => 0,
            };
            passes.push(pass);
            let reason = if pass.dirtied <= self.options.remainder {
                StopReason::SmallRemainder
            } else if stalled >= MAX_STALLED {
                StopReason::NotShrinking
            } else if passes.len() as u64 >= u64::from(self.options.max_passes) {
                StopReason::MaxPasses
            } else {
                continue;
            };
            let expected_write = pass.dirtied as f64 / pass.write_rate().max(1.0);
            let convergence = Convergence {
                reason,
                remaining: pass.dirtied,
                expected_write: Duration::from_secs_f64(expected_write),
            };
            return Ok((passes, convergence));
        }
    }

    /// Writes the pages of a pass. Returns the number of bytes written.
    fn write(&mut self, is_first: bool) -> Result<u64, PassError> {
        let (tracker, reader) = (self.tracker, self.reader);
        let pages = match (is_first, self.kind) {
            (true, Kind::Full) => {
                self.writer.write_full(reader)?;
                return Ok(self.writer.ram_size());
            }
            (true, Kind::Diff) => self.writer.write_diff(reader, self.epoch.bitmap())?,
            (false, _) => {
                let extended = tracker.extend_epoch(self.epoch);
                let dirtied =
                    extended.map_err(|error| PassError::Tracker(LiveError::Tracker(error)))?;
                self.writer.write_diff(reader, &dirtied)?
            }
        };
        Ok(pages * self.writer.page_size())
    }
}
