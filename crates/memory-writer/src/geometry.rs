//! Sizes of a memory file and of its pages.

use std::ops::Range;
use std::path::Path;

use dirty_bitmap::{DirtyBitmap, PageSet};
use image_format::{MAX_RAM_SIZE, RAW_UNIT};
use page_reader::PageReader;

use crate::error::{RamError, SnapshotError};

/// Returns the first address of the RAM that `reader` states. A bitmap of RAM with gaps covers the
/// offsets of the memory file, which begin at 0.
pub(crate) fn reader_start<R: PageReader + ?Sized>(reader: &R) -> Option<u64> {
    let mut addresses = reader.ram_layout()?.addresses();
    let first = addresses.next()?;
    Some(addresses.next().map_or(first.start, |_| 0))
}

/// Checks that a bitmap covers the offsets of the memory file, or the addresses of a reader whose
/// RAM has this [start](reader_start), if that is known.
pub(crate) fn check_bitmap_start(
    bitmap_start: u64,
    reader_start: Option<u64>,
) -> Result<(), SnapshotError> {
    match reader_start {
        Some(ram) if bitmap_start != 0 && bitmap_start != ram => Err(SnapshotError::BitmapStart {
            bitmap: bitmap_start,
            ram,
        }),
        _ => Ok(()),
    }
}

/// The valid sizes of a memory file and of its pages, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// A multiple of the page size, and at most 2^52.
    pub(crate) ram_size: u64,
    /// A power of two, and at least 512.
    pub(crate) page_size: u64,
}

impl Geometry {
    pub(crate) fn new(ram_size: u64, page_size: u64) -> Result<Self, RamError> {
        if ram_size == 0 {
            return Err(RamError::NoRam);
        }
        if ram_size > MAX_RAM_SIZE {
            return Err(RamError::TooLarge { ram_size });
        }
        if !page_size.is_power_of_two() {
            return Err(RamError::PageSizeNotPowerOfTwo { page_size });
        }
        if page_size < RAW_UNIT {
            return Err(RamError::PageTooSmall { page_size });
        }
        if page_size > ram_size {
            return Err(RamError::PageLargerThanRam {
                page_size,
                ram_size,
            });
        }
        if !ram_size.is_multiple_of(page_size) {
            return Err(RamError::NotWholePages {
                ram_size,
                page_size,
            });
        }
        Ok(Self {
            ram_size,
            page_size,
        })
    }

    /// Returns an empty set of pages of the memory file.
    pub(crate) fn no_pages(self) -> PageSet {
        PageSet::new(0..self.ram_size, self.page_size)
    }

    /// Checks that a bitmap covers RAM of this size, which starts at `ram_start` if that is known,
    /// and the RAM of a reader with the [start](reader_start) `reader_start`.
    pub(crate) fn check_bitmap<K>(
        self,
        bitmap: &DirtyBitmap<K>,
        ram_start: Option<u64>,
        reader_start: Option<u64>,
    ) -> Result<(), SnapshotError> {
        if bitmap.ram_size() != self.ram_size {
            return Err(SnapshotError::BitmapSize {
                bitmap: bitmap.ram_size(),
                file: self.ram_size,
            });
        }
        match ram_start {
            Some(ram) if ram != bitmap.ram_start() => Err(SnapshotError::BitmapStart {
                bitmap: bitmap.ram_start(),
                ram,
            }),
            _ => check_bitmap_start(bitmap.ram_start(), reader_start),
        }
    }

    /// Checks that a reader has RAM of this size, as far as it knows its size.
    pub(crate) fn check_reader<R: PageReader + ?Sized>(
        self,
        reader: &R,
        dest: &Path,
    ) -> Result<(), SnapshotError> {
        match reader.known_size() {
            Some(size) if size != self.ram_size => Err(SnapshotError::ReaderSize {
                dest: dest.to_owned(),
                file: self.ram_size,
                reader: size,
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// Checks that runs ascend, do not overlap, are inside the RAM, and begin and end at multiples
    /// of `unit`.
    pub(crate) fn check_runs(
        self,
        runs: impl Iterator<Item = Range<u64>>,
        unit: u64,
    ) -> Result<(), SnapshotError> {
        let mut last = 0;
        for Range { start, end } in runs {
            let whole = start.is_multiple_of(unit) && end.is_multiple_of(unit);
            if !whole || start < last || start >= end || end > self.ram_size {
                return Err(SnapshotError::Run {
                    start,
                    end,
                    page_size: self.page_size,
                    ram_size: self.ram_size,
                });
            }
            last = end;
        }
        Ok(())
    }
}
