//! One write of runs of pages to the staged file.

use std::ops::Range;

use atomic_file::AtomicWriter;
use page_reader::PageReader;
use sparse_file::{WriteError, WriteOptions, write_runs};

use crate::error::SnapshotError;
use crate::guest::Guest;
use crate::held::Held;
use crate::meter::Meter;
use crate::placing::Pass;
use crate::sealing::Sealing;
use crate::unwritten::Unwritten;

/// Where the pages go, and who keeps account of them.
pub(crate) struct Sink<'w> {
    pub(crate) stage: &'w AtomicWriter,
    pub(crate) options: &'w WriteOptions,
    pub(crate) unwritten: &'w mut Option<Unwritten>,
    pub(crate) held: &'w mut Held,
}

impl Sink<'_> {
    /// Writes `runs` of whole pages, together at most `total` bytes unless they are marked meanwhile, and returns how many bytes those were. If it is
    /// known how many runs there are, it is `count`.
    pub(crate) fn write<R: PageReader + ?Sized>(
        self,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
        total: u64,
        count: Option<u64>,
        meter: &Meter<'_>,
    ) -> Result<u64, SnapshotError> {
        let dest = || self.stage.dest_path().to_owned();
        let cancelled = |written| SnapshotError::Cancelled {
            dest: dest(),
            written,
        };
        if meter.wrote(0).is_break() {
            return Err(cancelled(0));
        }
        let (mut raw_diff, sealing) = match self.held {
            Held::ByHoles(diff) => (Some(diff), None),
            Held::ByFooter(sealing) => (None, Some(sealing)),
            Held::Nothing | Held::ByCaller | Held::All => (None, None),
        };
        let runs = runs.inspect(|run| {
            if let Some(unwritten) = self.unwritten {
                unwritten.remove(run);
            }
            if let Some(diff) = &mut raw_diff {
                diff.add(run);
            }
        });
        let (file, options) = (self.stage.file(), self.options);
        let progress = &mut |bytes| meter.wrote(bytes);
        let written = match sealing {
            None => write_runs(file, runs, &Guest(reader), options, progress),
            Some(sealing) => {
                let (most, no_room) = (sealing.most_extents(), sealing.no_room());
                let Sealing { map, checksums, .. } = sealing;
                let pass = Pass::new(reader, file, map, checksums, total, most);
                pass.expect(count.unwrap_or(0));
                let mut written = write_runs(file, pass.file_runs(runs), &pass, options, progress);
                if let Err(WriteError::Source { offset, .. }) = &mut written {
                    *offset = pass.guest_offset(*offset);
                }
                if written.is_ok() && pass.is_full_up() {
                    return Err(SnapshotError::Seal {
                        dest: dest(),
                        source: no_room,
                    });
                }
                let placed = pass.finish();
                placed.into_map(map);
                written
            }
        };
        let written = written.map_err(|error| SnapshotError::from_write(dest(), error))?;
        if meter.cancelled() {
            return Err(cancelled(written));
        }
        Ok(written)
    }
}
