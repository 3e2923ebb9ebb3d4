//! Finds the pages in which two sources differ.

use std::io;
use std::ops::Range;

use dirty_bitmap::{DirtyBitmap, GeometryError, coalesce};
use memory_writer::{MemoryWriter, SnapshotError};
use page_reader::{PageReader, SecretBuffer, Touched, ZeroRuns, is_zeros};
use sparse_file::{Progress, ProgressFn};
use thiserror::Error;

use crate::image::READ_SIZE;
use crate::parallel;

/// Upper bound on the number of pages, at one bit each. 2^33 pages, 32 TiB in pages of 4 KiB, take
/// 1 GiB. The limit exists because an image may claim any RAM size: pages of zeros take no space in
/// its file.
const MAX_PAGES: u64 = 1 << 33;

/// An error returned if two sources could not be compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The RAM size and page size are not valid together.
    #[error("failed to compare RAM of this size in pages of this size: {0}")]
    Geometry(#[from] GeometryError),
    /// The RAM has more than 2^33 pages.
    #[error(
        "RAM of {ram_size} bytes has too many pages of {page_size} bytes to compare: \
         use larger pages"
    )]
    TooManyPages {
        /// The size of the RAM in bytes.
        ram_size: u64,
        /// The size of a page in bytes.
        page_size: u64,
    },
    /// A source could not be read.
    #[error("failed to read the {which} source at offset {offset:#x}: {source}")]
    Read {
        /// Either `older` or `newer`.
        which: &'static str,
        /// The guest offset at which the read began.
        offset: u64,
        /// The error of the source.
        source: io::Error,
    },
    /// A source was changed while it was read, so the result may be wrong.
    #[error("the {which} source was changed while it was compared: {source}")]
    Changed {
        /// Either `older` or `newer`.
        which: &'static str,
        /// The error of [`PageReader::check_source`].
        source: io::Error,
    },
    /// The progress function returned [`ControlFlow::Break`](std::ops::ControlFlow::Break).
    #[error("cancelled after {compared} bytes")]
    Cancelled {
        /// Bytes compared so far.
        compared: u64,
    },
}

/// Returns a bitmap of the pages in which `newer` differs from `older`: the pages that a diff must
/// hold.
///
/// The sources are two states of the same `ram_size` bytes of RAM, in pages of `page_size` bytes.
/// The bitmap starts at 0.
///
/// Ranges that a source [does not have](PageReader::populated) are not read: reading untouched RAM
/// would allocate it. [`Touched`] documents the memory that this takes. The returned bitmap takes
/// memory for the pages that differ.
///
/// `progress` is called before the first byte is read, with the bytes that neither source has as
/// done, and after each piece. It may cancel. The number of reading threads is the number of
/// processors, at most 8.
///
/// At the end, both sources are [checked](PageReader::check_source). It is an error if an image of
/// a [`Chain`](crate::Chain) was [written to](crate::Chain::check_unchanged) since it was opened.
///
/// # Errors
/// Returns a [`CompareError`].
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use memory_image::compare;
///
/// let (older, mut newer) = (vec![0; 1 << 20], vec![0; 1 << 20]);
/// newer[8195] = 1;
/// let changed = compare(&older, &newer, 1 << 20, 4096, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!(changed.runs().collect::<Vec<_>>(), [8192..12288]);
/// # Ok::<(), memory_image::CompareError>(())
/// ```
pub fn compare<A, B>(
    older: &A,
    newer: &B,
    ram_size: u64,
    page_size: u64,
    progress: &mut ProgressFn<'_>,
) -> Result<DirtyBitmap, CompareError>
where
    A: PageReader + Sync + ?Sized,
    B: PageReader + Sync + ?Sized,
{
    let found = find_difference(older, newer, ram_size, page_size, progress)?;
    Ok(found.changed)
}

/// The pages in which two states of RAM differ, as [`find_difference`] finds them.
#[derive(Debug)]
pub struct Difference {
    /// The pages that differ.
    pub changed: DirtyBitmap,
    /// Those of them that are zeros in the newer state. Pages of more than 1 MiB are left out.
    pub zeros: DirtyBitmap,
}

impl Difference {
    /// Writes the pages that differ to a diff that was just opened. `newer` is the newer state.
    ///
    /// If the writer [skips zeros](memory_writer::MemoryWriterOptions::skip_zeros), pages of zeros
    /// are recorded as such in a sealed or packed diff, as by
    /// [`Chain::write_to`](crate::Chain::write_to). They were
    /// zeros when they were compared. A raw diff stores them, because its holes are clean pages.
    ///
    /// # Errors
    /// As [`MemoryWriter::write_diff`] and [`MemoryWriter::write_zeros`].
    pub fn write_to<R: PageReader + ?Sized>(
        &self,
        writer: &mut MemoryWriter,
        newer: &R,
    ) -> Result<(), SnapshotError> {
        // A larger page may hold other bytes too.
        let pages_fit = writer.page_size() <= self.changed.page_size();
        if writer.image_id().is_none() || !writer.skips_zeros() || !pages_fit {
            return writer.write_diff(newer, &self.changed).map(drop);
        }
        let zeros = self.zeros.page_set();
        let runs = self.changed.runs();
        let found = ZeroRuns::known(runs, |run| zeros.gaps_in(run));
        writer.write_zeros(|| found.zeros().iter().cloned())?;
        let written = writer.write_runs(newer, || found.data().iter().cloned());
        written.map(drop)
    }

    /// Marks the pages of a piece of the RAM in which its bytes differ.
    fn mark(&self, start: u64, before: &[u8], after: &[u8]) {
        if before == after {
            return;
        }
        let page_size = self.changed.page_size();
        let page = usize::try_from(page_size).map_or(before.len(), |page| page.min(before.len()));
        let pages = before.chunks(page).zip(after.chunks(page));
        for (index, (before, after)) in pages.enumerate() {
            if before == after {
                continue;
            }
            let at = start + (index * page) as u64;
            self.changed.mark(at).expect("a page of the RAM");
            // A larger page is in several pieces.
            if page_size <= READ_SIZE && is_zeros(after) {
                self.zeros.mark(at).expect("a page of the RAM");
            }
        }
    }
}

/// Compares two sources as [`compare`] does, and finds the pages that became zeros, at little cost:
/// the bytes of a page that differs are in the caches of the processor.
///
/// # Errors
/// Returns a [`CompareError`].
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use memory_image::find_difference;
///
/// let (mut older, mut newer) = (vec![0; 1 << 20], vec![0; 1 << 20]);
/// (older[0], newer[8195]) = (1, 1);
/// let found = find_difference(&older, &newer, 1 << 20, 4096, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!(found.changed.runs().collect::<Vec<_>>(), [0..4096, 8192..12288]);
/// assert_eq!(found.zeros.runs().collect::<Vec<_>>(), [0..4096]);
/// # Ok::<(), memory_image::CompareError>(())
/// ```
pub fn find_difference<A, B>(
    older: &A,
    newer: &B,
    ram_size: u64,
    page_size: u64,
    progress: &mut ProgressFn<'_>,
) -> Result<Difference, CompareError>
where
    A: PageReader + Sync + ?Sized,
    B: PageReader + Sync + ?Sized,
{
    if ram_size / page_size.max(1) > MAX_PAGES {
        return Err(CompareError::TooManyPages {
            ram_size,
            page_size,
        });
    }
    let found = Difference {
        changed: DirtyBitmap::new(0, ram_size, page_size)?,
        zeros: DirtyBitmap::new(0, ram_size, page_size)?,
    };
    // Where one source has data, the other may have none, and a read would allocate memory.
    let (older, newer) = (
        &Touched::new(older, ram_size),
        &Touched::new(newer, ram_size),
    );
    let runs = populated_by_either(older, newer, ram_size);
    let read: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let chunks = runs.iter().flat_map(|run| {
        let starts = run.clone().step_by(READ_SIZE as usize);
        starts.map(|start| start..run.end.min(start.saturating_add(READ_SIZE)))
    });
    // Ranges that neither source has count as compared.
    let mut compared = ram_size - read;
    if progress(Progress::new(compared, ram_size)).is_break() {
        return Err(CompareError::Cancelled { compared });
    }
    parallel::for_each(
        usize::MAX,
        chunks,
        |range, [before, after]: &mut [SecretBuffer; 2]| {
            let len = (range.end - range.start) as usize;
            let (before, after) = (before.sized(len), after.sized(len));
            read_both(older, newer, range.start, before, after)?;
            found.mark(range.start, before, after);
            Ok(range.end - range.start)
        },
        |bytes: Result<u64, CompareError>| {
            compared += bytes?;
            match progress(Progress::new(compared, ram_size)).is_break() {
                true => Err(CompareError::Cancelled { compared }),
                false => Ok(()),
            }
        },
    )?;
    let changed_by = |which| move |source| CompareError::Changed { which, source };
    older.check_source().map_err(changed_by("older"))?;
    newer.check_source().map_err(changed_by("newer"))?;
    Ok(found)
}

fn read_both<A: PageReader + ?Sized, B: PageReader + ?Sized>(
    older: &A,
    newer: &B,
    offset: u64,
    before: &mut [u8],
    after: &mut [u8],
) -> Result<(), CompareError> {
    let failed = |which| {
        move |source| CompareError::Read {
            which,
            offset,
            source,
        }
    };
    older.read_at(offset, before).map_err(failed("older"))?;
    newer.read_at(offset, after).map_err(failed("newer"))
}

/// Returns the chunks in which either source has data, joined to runs. The number of runs depends
/// on the ranges in the sources and not on the number of chunks.
fn populated_by_either<A: PageReader + ?Sized, B: PageReader + ?Sized>(
    older: &Touched<'_, A>,
    newer: &Touched<'_, B>,
    ram_size: u64,
) -> Vec<Range<u64>> {
    let mut sources =
        [older.populated(0..ram_size), newer.populated(0..ram_size)].map(Iterator::peekable);
    let ascending = std::iter::from_fn(|| {
        let [older, newer] = sources.each_mut();
        let newer_is_next = match (older.peek(), newer.peek()) {
            (Some(older), Some(newer)) => newer.start < older.start,
            (older, _) => older.is_none(),
        };
        if newer_is_next {
            newer.next()
        } else {
            older.next()
        }
    });
    let chunks = ascending.map(|range| {
        let start = range.start - range.start % READ_SIZE;
        start..range.end.next_multiple_of(READ_SIZE).min(ram_size)
    });
    coalesce(chunks).collect()
}
