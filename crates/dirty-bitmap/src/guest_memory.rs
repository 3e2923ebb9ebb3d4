//! The bitmap as a dirty bitmap of the `vm-memory` crate.

mod slice;

use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bitmap::DirtyBitmap;
use crate::kind::Markable;
use crate::ranges::runs_of_word;

pub use slice::{DirtyBitmapSlice, SliceError};

impl<'a, K: Markable + 'static> WithBitmapSlice<'a> for DirtyBitmap<K> {
    type S = RefSlice<'a, Self>;
}

/// Offsets are relative to the start of the RAM.
impl<K: Markable + 'static> Bitmap for DirtyBitmap<K> {
    /// Marks every page that overlaps the `len` bytes from `offset` on.
    ///
    /// # Panics
    /// Panics if any byte is outside the RAM, because an ignored mark would be a lost page. The
    /// pages inside are marked nevertheless.
    fn mark_dirty(&self, offset: usize, len: usize) {
        let address = self.ram_start().saturating_add(offset as u64);
        if let Err(error) = self.mark_range(address, len as u64) {
            panic!("{error}: the region of guest memory is larger than its slice of the bitmap");
        }
    }

    /// Returns whether the granule at `offset` is marked, and `false` outside the RAM.
    fn dirty_at(&self, offset: usize) -> bool {
        let address = self.ram_start().saturating_add(offset as u64);
        self.is_dirty(address).unwrap_or(false)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Moves the marks that `vm-memory` has set for `memory` to this bitmap. Returns the number of
    /// moved marks, each of which stands for one page of an `AtomicBitmap`.
    ///
    /// The marks are those of writes by the VMM: see [`DirtyBitmapSlice`], which sets them in this
    /// bitmap directly, for the writes that are not marked. The bitmap covers the memory file: the
    /// regions of `memory` in ascending order, without the gaps between them.
    ///
    /// # Order
    /// Call this before each [`begin_epoch`](DirtyBitmap::begin_epoch) and
    /// [`extend`](crate::Epoch::extend), so that the marks are in that epoch. With the crate
    /// `kvm-backend`, pass the call to `DirtyLogOptions::mark_host_writes`, and each harvest makes
    /// it. Devices may write during the call. `vm-memory` writes first and then marks, so a mark
    /// that this method moves stands for bytes that a later copy includes, and a mark that is set
    /// later stays for the next call. No mark is lost if the save fails: it is in this bitmap, and
    /// the epoch restores it.
    ///
    /// For an image of one point in time, the devices must have stopped before the last call of a
    /// save. A page that is written after the call belongs to the next save.
    ///
    /// # Errors
    /// Returns [`MarkMemoryError`] if `memory` has another size than the bitmap, or a region whose
    /// bitmap does not cover it, or which has none (`None`). No mark was moved.
    ///
    /// # Examples
    /// ```
    /// use dirty_bitmap::DirtyBitmap;
    /// use vm_memory::bitmap::AtomicBitmap;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
    /// let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?;
    /// let bitmap = DirtyBitmap::new(0, 2 << 20, 4096)?;
    ///
    /// memory.write_obj(7_u32, GuestAddress(4 << 30))?; // a device
    /// assert_eq!(bitmap.mark_guest_memory(&memory)?, 1);
    /// let epoch = bitmap.begin_epoch()?;
    /// assert!(epoch.bitmap().is_dirty(1 << 20)?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn mark_guest_memory<B: RegionBitmap>(
        &self,
        memory: &GuestMemoryMmap<B>,
    ) -> Result<u64, MarkMemoryError> {
        let mut memory_size = 0;
        for region in memory.iter() {
            let bitmap = (**region).bitmap().marks();
            let tracked = bitmap.map_or(0, |bitmap| bitmap.byte_size() as u64);
            if tracked < region.len() {
                return Err(MarkMemoryError::RegionNotTracked {
                    guest_start: region.start_addr().0,
                    region_size: region.len(),
                    tracked,
                });
            }
            memory_size += region.len();
        }
        if memory_size != self.ram_size() {
            return Err(MarkMemoryError::Size {
                memory_size,
                ram_size: self.ram_size(),
            });
        }
        let mut moved = 0;
        let mut region_start = 0;
        for region in memory.iter() {
            // Each region has a bitmap, or the check above has failed.
            if let Some(bitmap) = (**region).bitmap().marks() {
                moved += self.mark_region(region_start, region.len(), bitmap);
            }
            region_start += region.len();
        }
        Ok(moved)
    }

    /// Moves the marks of one region of `len` bytes at the offset `start`.
    fn mark_region(&self, start: u64, len: u64, bitmap: &AtomicBitmap) -> u64 {
        let page_size = page_size_of(bitmap);
        let mut moved = 0;
        for (word, bits) in (0_u64..).zip(bitmap.get_and_reset()) {
            for run in runs_of_word(bits) {
                moved += run.end - run.start;
                let at = |bit: u64| len.min((word * 64 + bit).saturating_mul(page_size));
                let (first, end) = (at(run.start), at(run.end));
                if first < end {
                    self.marks.mark_offsets(start + first..start + end);
                }
            }
        }
        moved
    }
}

/// The bitmap of a region of guest memory whose marks
/// [`mark_guest_memory`](DirtyBitmap::mark_guest_memory) moves: an `AtomicBitmap`, or an
/// `Option<AtomicBitmap>` of a VMM that tracks writes only on request.
///
/// No other type implements the trait.
#[diagnostic::on_unimplemented(
    message = "guest memory with `{Self}` has no marks that can be moved",
    label = "not the memory of an `AtomicBitmap`",
    note = "a `DirtyBitmapSlice` marks in the bitmap itself, and needs no call",
    note = "memory without a bitmap (`()`) marks no write: call `GuestRam::mark` after each one"
)]
pub trait RegionBitmap: Bitmap + sealed::Marks {}

impl RegionBitmap for AtomicBitmap {}
impl RegionBitmap for Option<AtomicBitmap> {}

mod sealed {
    use vm_memory::bitmap::AtomicBitmap;

    pub trait Marks {
        fn marks(&self) -> Option<&AtomicBitmap>;
    }

    impl Marks for AtomicBitmap {
        fn marks(&self) -> Option<&AtomicBitmap> {
            Some(self)
        }
    }

    impl Marks for Option<AtomicBitmap> {
        fn marks(&self) -> Option<&AtomicBitmap> {
            self.as_ref()
        }
    }
}

/// Returns the page size of a bitmap, for which it has no method.
fn page_size_of(bitmap: &AtomicBitmap) -> u64 {
    let (bytes, pages) = (bitmap.byte_size(), bitmap.len());
    if pages < 2 {
        return bytes.max(1) as u64;
    }
    // The page sizes that make `pages` pages of `bytes` bytes: one, if there are many pages.
    let (mut min, mut max) = (bytes.div_ceil(pages), (bytes - 1) / (pages - 1));
    if min == max {
        return min as u64;
    }
    // Otherwise find where the second page begins, in a copy that no thread marks.
    let probe = bitmap.clone();
    probe.reset();
    probe.set_bit(1);
    while min < max {
        let middle = min.midpoint(max);
        match probe.is_addr_set(middle) {
            true => max = middle,
            false => min = middle + 1,
        }
    }
    min as u64
}

/// An error for guest memory that does not fit the bitmap. No mark was moved.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MarkMemoryError {
    /// The memory has another size than the RAM of the bitmap.
    #[error(
        "the guest memory has {memory_size} bytes and the bitmap covers {ram_size}: pass a bitmap \
         of the whole memory, without the gaps between its regions"
    )]
    Size {
        /// The size of all regions in bytes.
        memory_size: u64,
        /// The size that the bitmap covers, in bytes.
        ram_size: u64,
    },
    /// The `AtomicBitmap` of a region does not cover the region. Writes to the rest set no marks.
    #[error(
        "the bitmap of the region at {guest_start:#x} covers {tracked} of its {region_size} bytes: \
         pass `AtomicBitmap::with_len` of the region's size to `MmapRegionBuilder::new_with_bitmap`"
    )]
    RegionNotTracked {
        /// The guest-physical address of the region.
        guest_start: u64,
        /// The size of the region in bytes.
        region_size: u64,
        /// The number of bytes that its bitmap covers.
        tracked: u64,
    },
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn the_page_size_of_any_bitmap_is_found() {
        for page_size in [1, 3, 128, 4096, 5000, 65536] {
            for size in [page_size + 1, 70_000, 1 << 20, 20 << 20] {
                let bitmap = AtomicBitmap::new(size, NonZeroUsize::new(page_size).unwrap());
                bitmap.set_bit(0);
                let expected = if bitmap.len() < 2 { size } else { page_size };
                assert_eq!(page_size_of(&bitmap), expected as u64, "{size}");
            }
        }
    }

    /// A bitmap may have more pages than its region.
    #[test]
    fn marks_past_the_end_of_a_region_are_dropped() {
        const PAGE: usize = 4096;
        let dirty = DirtyBitmap::new(0, 4 * PAGE as u64, 2 * PAGE as u64).unwrap();
        let bitmap = AtomicBitmap::new(5 * PAGE, NonZeroUsize::new(PAGE).unwrap());
        for page in [0, 3, 4] {
            bitmap.set_bit(page);
        }
        assert_eq!(dirty.mark_region(0, 3 * PAGE as u64, &bitmap), 3);
        assert_eq!(dirty.runs().collect::<Vec<_>>(), [0..2 * PAGE as u64]);
        assert!(!bitmap.is_bit_set(4));
    }
}
