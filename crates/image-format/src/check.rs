//! Checks that a footer is consistent.

use std::ops::Range;

use crate::checksums::CHUNK_SIZE;
use crate::error::InvalidFooter;
use crate::footer::{Footer, ImageKind};
use crate::layout::Placement;
use crate::run::{Run, Storage};
use crate::version::{MAX_RAM_SIZE, Version};

impl Footer {
    /// Checks that the footer is consistent, as [`write`](Self::write) and [`read`](Self::read)
    /// require.
    ///
    /// # Errors
    /// Returns the first inconsistency as [`InvalidFooter`].
    pub fn check(&self) -> Result<(), InvalidFooter> {
        self.check_with(self.runs.iter().copied()).map(|_| ())
    }

    /// Checks the footer with `runs` in place of its own, and returns their totals.
    pub(crate) fn check_with(
        &self,
        runs: impl Iterator<Item = Run> + Clone,
    ) -> Result<RunTotals, InvalidFooter> {
        self.check_head()?;
        let mut totals = RunTotals::default();
        for run in runs.clone() {
            totals.add(&run, self)?;
        }
        totals.check_end(self)?;
        match self.layout.placement() {
            Placement::ByOffset => {}
            Placement::Appended => self.check_packed(runs)?,
        }
        let (checksums, chunks) = (self.checksums.len() as u64, totals.chunks);
        if checksums != chunks {
            return Err(InvalidFooter::Checksums { checksums, chunks });
        }
        Ok(totals)
    }

    /// Checks everything except runs and checksums.
    ///
    /// # Errors
    /// Returns the first inconsistency as [`InvalidFooter`].
    pub fn check_head(&self) -> Result<(), InvalidFooter> {
        if !self.layout.has_footer() {
            return Err(InvalidFooter::Raw);
        }
        let own = Some(self.id);
        if self.kind == (ImageKind::Diff { parent: own }) {
            return Err(InvalidFooter::OwnParent);
        }
        check_sizes(self.version, self.ram_size, self.page_size)?;
        check_regions(&self.regions, self.ram_size)?;
        check_metadata(self.metadata.len() as u64)
    }

    /// Checks that present runs fill the file from [`data_start`](Self::data_start), in any order.
    fn check_packed(&self, runs: impl Iterator<Item = Run> + Clone) -> Result<(), InvalidFooter> {
        let at = |run: Run| match run.stored {
            Storage::At(offset) => Some((offset, run.len)),
            Storage::Zeros => None,
        };
        let stored = runs.filter_map(at);
        // Pages of one pass are in order. Those of several passes are sorted, which takes memory.
        if self.check_contiguous(stored.clone()).is_ok() {
            return Ok(());
        }
        let mut stored: Vec<_> = stored.collect();
        stored.sort_unstable();
        self.check_contiguous(stored)
    }

    fn check_contiguous(
        &self,
        stored: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), InvalidFooter> {
        let mut end = self.data_start();
        for (offset, len) in stored {
            if offset != end {
                return Err(InvalidFooter::Packing {
                    expected: end,
                    offset,
                });
            }
            // Runs are inside the RAM and do not overlap, so the sum is below 2^53.
            end += len;
        }
        Ok(())
    }
}

/// Totals of valid runs, added one after another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RunTotals {
    pub(crate) runs: u64,
    /// The guest offset after the last run.
    end: u64,
    pub(crate) present: u64,
    /// The number of chunks with present bytes.
    pub(crate) chunks: u64,
    /// The number of the chunk after the last chunk with present bytes.
    next_chunk: u64,
}

impl RunTotals {
    pub(crate) fn add(&mut self, run: &Run, footer: &Footer) -> Result<(), InvalidFooter> {
        // On 64-bit hosts, an index can hold every number of a file.
        check_run(self.runs as usize, run, self.end, footer)?;
        self.runs += 1;
        self.end = run.start + run.len;
        if run.stored != Storage::Zeros {
            self.present += run.len;
            let first = (run.start / CHUNK_SIZE).max(self.next_chunk);
            self.next_chunk = (self.end - 1) / CHUNK_SIZE + 1;
            self.chunks += self.next_chunk - first;
        }
        Ok(())
    }

    pub(crate) fn check_end(&self, footer: &Footer) -> Result<(), InvalidFooter> {
        match footer.kind {
            ImageKind::Full if self.end != footer.ram_size => {
                Err(InvalidFooter::NotFull { offset: self.end })
            }
            _ => Ok(()),
        }
    }
}

/// Checks that `regions` are the address ranges of RAM of `ram_size` bytes.
///
/// # Errors
/// Returns [`InvalidFooter::Region`] or [`InvalidFooter::RegionsSum`].
pub fn check_regions(regions: &[Range<u64>], ram_size: u64) -> Result<(), InvalidFooter> {
    let (mut last, mut sum) = (0, 0_u64);
    for (index, region) in regions.iter().enumerate() {
        if region.start < last || region.end <= region.start {
            return Err(InvalidFooter::Region { index });
        }
        last = region.end;
        // Regions do not overlap, so the sum is below 2^64.
        sum += region.end - region.start;
    }
    if sum == ram_size {
        Ok(())
    } else {
        Err(InvalidFooter::RegionsSum { sum, ram_size })
    }
}

/// Checks that metadata of `len` bytes fits into a footer.
///
/// # Errors
/// Returns [`InvalidFooter::Metadata`].
pub fn check_metadata(len: u64) -> Result<(), InvalidFooter> {
    if len > Footer::MAX_METADATA as u64 {
        return Err(InvalidFooter::Metadata { len });
    }
    Ok(())
}

/// Checks the size of RAM and pages.
pub(crate) fn check_sizes(
    version: Version,
    ram_size: u64,
    page_size: u64,
) -> Result<(), InvalidFooter> {
    let fits = (1..=MAX_RAM_SIZE).contains(&ram_size);
    let page = page_size.is_power_of_two() && page_size >= version.min_page_size();
    if fits && page && ram_size.is_multiple_of(page_size) {
        Ok(())
    } else {
        Err(InvalidFooter::Sizes {
            ram_size,
            page_size,
        })
    }
}

/// Checks that `run`, with the number `index`, may follow a run that ends at `last`.
pub(crate) fn check_run(
    index: usize,
    run: &Run,
    last: u64,
    footer: &Footer,
) -> Result<(), InvalidFooter> {
    let in_ram = run
        .start
        .checked_add(run.len)
        .is_some_and(|end| end <= footer.ram_size);
    let whole = |bytes: u64| bytes.is_multiple_of(footer.page_size);
    if run.len == 0 || !in_ram || !whole(run.start) || !whole(run.len) {
        return Err(InvalidFooter::Run { index });
    }
    if run.start < last || footer.kind == ImageKind::Full && run.start != last {
        return Err(InvalidFooter::Order { index });
    }
    let Storage::At(offset) = run.stored else {
        return Ok(());
    };
    let start = footer.data_start();
    let fits = match footer.layout.placement() {
        Placement::ByOffset => offset == start + run.start,
        Placement::Appended => whole(offset) && offset >= start,
    };
    match fits {
        true => Ok(()),
        false => Err(InvalidFooter::StoredAt { index, offset }),
    }
}
