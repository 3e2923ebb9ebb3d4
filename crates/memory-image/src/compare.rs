//! Which pages of two sources differ.

use std::io;
use std::ops::{ControlFlow, Range};

use dirty_bitmap::{DirtyBitmap, GeometryError};
use page_reader::{PageReader, PopulatedRanges};
use thiserror::Error;

/// Bytes of each source that are compared at a time, and between two calls of the progress function.
const STRETCH: u64 = 1 << 20;

/// Why two sources could not be compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// There is no such RAM.
    #[error("RAM of that size can't be compared in such pages")]
    Geometry(#[from] GeometryError),
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
/// What [neither source has](PageReader::populated) is not read. `progress` is told the bytes that are done, and may cancel.
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
/// let changed = compare(&older, &newer, 1 << 20, 4096, &mut |_| ControlFlow::Continue(()))?;
/// assert_eq!(changed.runs().collect::<Vec<_>>(), [8192..12288]);
/// # Ok::<(), memory_image::CompareError>(())
/// ```
pub fn compare<A: PageReader + ?Sized, B: PageReader + ?Sized>(
    older: &A,
    newer: &B,
    ram_size: u64,
    page_size: u64,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<DirtyBitmap, CompareError> {
    let changed = DirtyBitmap::new(0, ram_size, page_size)?;
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut ranges =
        [older.populated(0..ram_size), newer.populated(0..ram_size)].map(Populated::new);
    // Pages larger than a stretch are compared piece by piece.
    for start in (0..ram_size).step_by(STRETCH as usize) {
        let stretch = start..ram_size.min(start + STRETCH);
        let populated = ranges.each_mut().map(|source| source.reaches(&stretch));
        if populated != [false, false] {
            let len = (stretch.end - stretch.start) as usize;
            before.resize(len, 0);
            after.resize(len, 0);
            let failed = |which| {
                move |source| CompareError::Read {
                    which,
                    offset: start,
                    source,
                }
            };
            older.read_at(start, &mut before).map_err(failed("older"))?;
            newer.read_at(start, &mut after).map_err(failed("newer"))?;
            mark(&changed, page_size, start, &before, &after);
        }
        if progress(stretch.end).is_break() {
            let compared = stretch.end;
            return Err(CompareError::Cancelled { compared });
        }
    }
    Ok(changed)
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

/// Ranges that are asked about in ascending order.
struct Populated<'s> {
    ranges: PopulatedRanges<'s>,
    current: Range<u64>,
}

impl<'s> Populated<'s> {
    fn new(ranges: PopulatedRanges<'s>) -> Self {
        Self {
            ranges,
            current: 0..0,
        }
    }

    fn reaches(&mut self, range: &Range<u64>) -> bool {
        while self.current.end <= range.start {
            match self.ranges.next() {
                Some(next) => self.current = next,
                None => return false,
            }
        }
        self.current.start < range.end
    }
}
