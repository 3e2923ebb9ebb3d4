//! Which pages of two sources differ.

use std::io;
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};
use std::thread;

use dirty_bitmap::{DirtyBitmap, GeometryError};
use page_reader::{PageReader, SecretBuffer, Touched};
use thiserror::Error;

use crate::page_set::coalesce;

/// Bytes of each source that are compared at a time, and between two calls of the progress function.
const STRETCH: u64 = 1 << 20;
/// Memory is not faster than a few of them.
const THREADS: usize = 8;

/// The most pages that a bitmap is made for, a bit each, because an image says that its RAM has so many: 2^33, 32 TiB in pages of 4 KiB, take 1 GiB. The
/// size of the file proves nothing: pages of zeros take no room in it.
const MAX_PAGES: u64 = 1 << 33;

/// Why two sources could not be compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// There is no such RAM.
    #[error("RAM of that size can't be compared in such pages")]
    Geometry(#[from] GeometryError),
    /// The RAM has more than 2^33 pages.
    #[error(
        "RAM of {ram_size:#x} bytes has too many pages of {page_size:#x} to keep account of: compare it in larger ones"
    )]
    TooManyPages {
        /// The size of the RAM in bytes.
        ram_size: u64,
        /// The size of a page in bytes.
        page_size: u64,
    },
    /// A source could not be read.
    #[error("the {which} can't be read at offset {offset:#x}")]
    Read {
        /// `older` or `newer` source.
        which: &'static str,
        /// The guest offset from which on bytes were wanted.
        offset: u64,
        /// What it said.
        source: io::Error,
    },
    /// The progress function said [`ControlFlow::Break`].
    #[error("cancelled after {compared} bytes")]
    Cancelled {
        /// Bytes compared until then.
        compared: u64,
    },
}

/// Marks the pages of `newer` that differ from `older`, two states of the same `ram_size` bytes of RAM, in pages of `page_size` bytes: what a diff has to
/// hold. The bitmap starts at 0.
///
/// What a source [does not have](PageReader::populated) is not read: reading untouched RAM would allocate it. Memory for that is as of [`Touched`]; of the
/// bitmap that is returned, the host gives memory for what differs. `progress` is told the bytes that are done, first those of which
/// neither source has any, and may cancel; it is called from several threads, one at a time. As many threads as the machine has processors read, at most 8.
///
/// # Errors
/// [`CompareError`].
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use memory_image::compare;
///
/// let (older, mut newer) = (vec![0; 1 << 20], vec![0; 1 << 20]);
/// newer[8195] = 1;
/// let changed = compare(&older, &newer, 1 << 20, 4096, &|_| ControlFlow::Continue(()))?;
/// assert_eq!(changed.runs().collect::<Vec<_>>(), [8192..12288]);
/// # Ok::<(), memory_image::CompareError>(())
/// ```
pub fn compare<A, B>(
    older: &A,
    newer: &B,
    ram_size: u64,
    page_size: u64,
    progress: &(dyn Fn(u64) -> ControlFlow<()> + Sync),
) -> Result<DirtyBitmap, CompareError>
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
    let changed = DirtyBitmap::new(0, ram_size, page_size)?;
    // Around what one has, the other may have nothing, which a read would allocate.
    let (older, newer) = (
        &Touched::new(older, ram_size),
        &Touched::new(newer, ram_size),
    );
    let runs = populated_by_either(older, newer, ram_size);
    let read: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let stretches = runs.iter().flat_map(|run| {
        let starts = run.clone().step_by(STRETCH as usize);
        starts.map(|start| start..run.end.min(start.saturating_add(STRETCH)))
    });
    let work = Mutex::new(stretches);
    // What neither has is done.
    let state = Mutex::new((ram_size - read, None));
    if progress(ram_size - read).is_break() {
        let compared = ram_size - read;
        return Err(CompareError::Cancelled { compared });
    }
    let compare_stretches = || {
        let (mut before, mut after) = (SecretBuffer::new(), SecretBuffer::new());
        loop {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(range) = next else { return };
            let len = (range.end - range.start) as usize;
            let (before, after) = (before.sized(len), after.sized(len));
            let read = read_both(older, newer, range.start, before, after);
            if read.is_ok() {
                mark(&changed, page_size, range.start, before, after);
            }
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let (compared, failed) = &mut *state;
            *compared += range.end - range.start;
            let cancelled = progress(*compared)
                .is_break()
                .then_some(CompareError::Cancelled {
                    compared: *compared,
                });
            if failed.is_none() {
                *failed = read.err().or(cancelled);
            }
            if failed.is_some() {
                return;
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        for _ in 1..threads.min(THREADS) {
            // Fewer threads take longer, and that is all.
            let _ = thread::Builder::new().spawn_scoped(scope, compare_stretches);
        }
        compare_stretches();
    });
    match state.into_inner().unwrap_or_else(PoisonError::into_inner) {
        (_, Some(error)) => Err(error),
        (_, None) => Ok(changed),
    }
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

fn mark(changed: &DirtyBitmap, page_size: u64, start: u64, before: &[u8], after: &[u8]) {
    if before == after {
        return;
    }
    let page = usize::try_from(page_size).map_or(before.len(), |page| page.min(before.len()));
    let pages = before.chunks(page).zip(after.chunks(page));
    for (index, (before, after)) in pages.enumerate() {
        if before != after {
            changed
                .set_dirty(start + (index * page) as u64)
                .expect("a page of the RAM");
        }
    }
}

/// The stretches that either source has anything in, as runs: as many as there are ranges in the sources, and not as there are stretches.
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
    let stretches = ascending.map(|range| {
        let start = range.start - range.start % STRETCH;
        start..range.end.next_multiple_of(STRETCH).min(ram_size)
    });
    coalesce(stretches).collect()
}
