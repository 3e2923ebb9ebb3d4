//! Writes runs of pages to the staged file.

use std::ops::Range;

use atomic_file::AtomicWriter;
use page_reader::PageReader;
use sparse_file::{WriteError, WriteOptions, write_runs};

use crate::error::SnapshotError;
use crate::footer_builder::FooterBuilder;
use crate::page_record::PageRecord;
use crate::placement::WritePass;
use crate::progress::ProgressCounter;
use crate::reader_source::ReaderSource;
use crate::stale_pages::StalePages;

/// The target of one write and the records of what was written.
pub(crate) struct WriteTarget<'w> {
    pub(crate) staged: &'w AtomicWriter,
    pub(crate) options: &'w WriteOptions,
    pub(crate) stale_pages: &'w mut Option<StalePages>,
    pub(crate) pages: &'w mut PageRecord,
}

impl WriteTarget<'_> {
    /// Writes `runs` of whole pages and returns the number of bytes written. That is at max_extents
    /// `total`, unless pages are marked during the write. `count` is the number of runs, if known.
    pub(crate) fn write<R: PageReader + ?Sized>(
        self,
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
        total: u64,
        count: Option<u64>,
        counter: &ProgressCounter<'_>,
    ) -> Result<u64, SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        let cancelled = |written| SnapshotError::Cancelled {
            dest: dest(),
            written,
        };
        if counter.wrote(0).is_break() {
            return Err(cancelled(0));
        }
        let (mut raw_diff, footer) = match self.pages {
            PageRecord::Holes(diff) => (Some(diff), None),
            PageRecord::Footer(footer) => (None, Some(footer)),
            PageRecord::Empty | PageRecord::Caller | PageRecord::All => (None, None),
        };
        let runs = runs.inspect(|run| {
            if let Some(stale_pages) = self.stale_pages {
                stale_pages.remove(run);
            }
            if let Some(diff) = &mut raw_diff {
                diff.add(run);
            }
        });
        let (file, options) = (self.staged.file(), self.options);
        let progress = &mut |bytes| counter.wrote(bytes);
        let written = match footer {
            None => write_runs(file, runs, &ReaderSource(reader), options, progress),
            Some(footer) => {
                let (max_extents, too_many_runs) = (footer.max_extents(), footer.too_many_runs());
                let FooterBuilder { map, checksums, .. } = footer;
                let pass = WritePass::new(reader, file, map, checksums, total, max_extents);
                pass.reserve(count.unwrap_or(0));
                let mut written = write_runs(file, pass.file_runs(runs), &pass, options, progress);
                if let Err(WriteError::Source { offset, .. }) = &mut written {
                    *offset = pass.guest_offset(*offset);
                }
                if written.is_ok() && pass.is_footer_full() {
                    return Err(SnapshotError::Seal {
                        dest: dest(),
                        source: too_many_runs,
                    });
                }
                let new_extents = pass.finish();
                new_extents.merge_into(map);
                written
            }
        };
        let written = written.map_err(|error| SnapshotError::from_write(dest(), error))?;
        if counter.cancelled() {
            return Err(cancelled(written));
        }
        Ok(written)
    }
}
