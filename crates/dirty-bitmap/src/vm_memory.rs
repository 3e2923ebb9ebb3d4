//! The bitmap as a dirty bitmap of the `vm-memory` crate.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bitmap::DirtyBitmap;
use crate::geometry::OutOfRange;
use crate::kind::{Markable, Untracked};
use crate::ranges::runs_of_word;

/// The part of a shared bitmap that belongs to one region of guest memory.
///
/// Each write through a `GuestMemoryMmap<DirtyBitmapSlice>` marks its pages in the bitmap, after
/// the bytes are written ([mark last](DirtyBitmap#mark-last)). A hypervisor's dirty log does not
/// have these writes, because it has only those of the guest.
///
/// Not marked are writes that do not go through the methods of `vm-memory`: by a pointer from
/// `get_host_address` or `as_ptr`, by the kernel (vhost, io_uring into guest memory), and by
/// another process that maps the memory (vhost-user). Mark these by
/// [`mark_range`](DirtyBitmap::mark_range), which takes offsets in the memory file if there are
/// several regions.
///
/// `vm-memory`'s `NewBitmap` is not implemented, so `GuestMemoryMmap::from_ranges` is not
/// available: it would create a bitmap for each region. Create the regions as in the example.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use dirty_bitmap::{DirtyBitmap, DirtyBitmapSlice};
/// use vm_memory::mmap::MmapRegionBuilder;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // 1 MiB at 0 and 1 MiB at 4 GiB. The bitmap covers the memory file, which has no gap.
/// let bitmap = Arc::new(DirtyBitmap::new(0, 2 << 20, 4096)?);
/// let mut regions = Vec::new();
/// let mut offset = 0;
/// for (start, size) in [(0, 1 << 20), (4 << 30, 1 << 20)] {
///     let slice = DirtyBitmapSlice::new(Arc::clone(&bitmap), offset, size as u64)?;
///     let mapping = MmapRegionBuilder::new_with_bitmap(size, slice)
///         .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
///         .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
///         .build()?;
///     regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or("too large")?);
///     offset += size as u64;
/// }
/// let memory = GuestMemoryMmap::from_regions(regions)?;
///
/// memory.write_obj(7_u32, GuestAddress((4 << 30) + 0x3000))?; // a device
/// assert!(bitmap.runs().eq([0x10_3000..0x10_4000]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a slice marks nothing until a region of guest memory uses it"]
pub struct DirtyBitmapSlice<K = Untracked> {
    bitmap: Arc<DirtyBitmap<K>>,
    /// The first byte of the slice, as an offset from the start of the RAM.
    offset: usize,
}

impl<K: Markable> DirtyBitmapSlice<K> {
    /// Returns the slice of the `len` bytes from `offset` on, counted from the start of the RAM.
    ///
    /// The length is that of the region that will use the slice. `vm-memory` does not check it.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if the bytes are not inside the RAM of the bitmap.
    pub fn new(bitmap: Arc<DirtyBitmap<K>>, offset: u64, len: u64) -> Result<Self, OutOfRange> {
        let ram = bitmap.marks.ram;
        let address = ram.start.saturating_add(offset);
        let (_, inside) = ram.clip(address, len);
        inside?;
        let outside = || ram.out_of_range(address, address.saturating_add(len));
        let offset = usize::try_from(offset).map_err(|_| outside())?;
        Ok(Self { bitmap, offset })
    }

    /// Returns the whole bitmap.
    #[must_use]
    pub fn bitmap(&self) -> &Arc<DirtyBitmap<K>> {
        &self.bitmap
    }
}

impl<K> Clone for DirtyBitmapSlice<K> {
    fn clone(&self) -> Self {
        Self {
            bitmap: Arc::clone(&self.bitmap),
            offset: self.offset,
        }
    }
}

impl<'a, K: Markable + 'static> WithBitmapSlice<'a> for DirtyBitmapSlice<K> {
    // A reference, because cloning an Arc for each access would make threads wait for each other.
    type S = RefSlice<'a, DirtyBitmap<K>>;
}

/// Offsets are relative to the start of the slice.
impl<K: Markable + 'static> Bitmap for DirtyBitmapSlice<K> {
    /// Marks as `DirtyBitmap` does, and panics in the same cases.
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, DirtyBitmap<K>> {
        RefSlice::new(&*self.bitmap, self.offset.saturating_add(offset))
    }
}

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
    /// [`extend`](crate::Epoch::extend), so that the marks are in that epoch. Devices may write
    /// during the call. `vm-memory` writes first and then marks, so a mark that this method moves
    /// stands for bytes that a later copy includes, and a mark that is set later stays for the next
    /// call. No mark is lost if the save fails: it is in this bitmap, and the epoch restores it.
    ///
    /// For an image of one point in time, the devices must have stopped before the last call of a
    /// save. A page that is written after the call belongs to the next save.
    ///
    /// # Errors
    /// Returns [`MarkMemoryError`] if `memory` has another size than the bitmap, or a region whose
    /// bitmap does not cover it. No mark was moved.
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
    pub fn mark_guest_memory(
        &self,
        memory: &GuestMemoryMmap<AtomicBitmap>,
    ) -> Result<u64, MarkMemoryError> {
        let mut memory_size = 0;
        for region in memory.iter() {
            let tracked = (**region).bitmap().byte_size() as u64;
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
            moved += self.mark_region(region_start, region.len(), (**region).bitmap());
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
