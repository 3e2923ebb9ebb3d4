//! The slices by which the regions of guest memory mark one bitmap.

use std::any::Any;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::bitmap::DirtyBitmap;
use crate::geometry::OutOfRange;
use crate::kind::{Markable, Untracked};

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
/// [`of_regions`](Self::of_regions) returns their slices. [`bitmap_of`](Self::bitmap_of) checks
/// slices that were created one by one.
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
/// let ram = [(0, 1 << 20), (4 << 30, 1 << 20)];
/// let slices = DirtyBitmapSlice::of_regions(&bitmap, ram.map(|(_, size)| size as u64))?;
/// let mut regions = Vec::new();
/// for ((start, size), slice) in ram.into_iter().zip(slices) {
///     let mapping = MmapRegionBuilder::new_with_bitmap(size, slice)
///         .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
///         .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
///         .build()?;
///     regions.push(GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or("too large")?);
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
    /// The length is that of the region that will use the slice. `vm-memory` checks neither the
    /// offset nor the length: [`of_regions`](Self::of_regions) computes both.
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

    /// Returns a slice for each region of guest memory, from the sizes of the regions in ascending
    /// order of their addresses. The bitmap covers the memory file, which has no gaps.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if the regions are larger than the RAM of the bitmap.
    pub fn of_regions(
        bitmap: &Arc<DirtyBitmap<K>>,
        sizes: impl IntoIterator<Item = u64>,
    ) -> Result<Vec<Self>, OutOfRange> {
        let mut offset = 0_u64;
        let slices = sizes.into_iter().map(|size| {
            let slice = Self::new(Arc::clone(bitmap), offset, size)?;
            offset += size;
            Ok(slice)
        });
        slices.collect()
    }

    /// Returns the bitmap of which each region of `memory` has its slice, and `None` if no region
    /// has a slice of this kind.
    ///
    /// `B` is `DirtyBitmapSlice<K>` or an `Option` of it.
    ///
    /// # Errors
    /// Returns [`SliceError`] if the regions mark several bitmaps, or if a region marks other pages
    /// than its own: for example, if all slices have the offset 0.
    pub fn bitmap_of<B: Bitmap + 'static>(
        memory: &GuestMemoryMmap<B>,
    ) -> Result<Option<Arc<DirtyBitmap<K>>>, SliceError>
    where
        K: 'static,
    {
        let slice_of = |bitmap: &dyn Any| -> Option<Self> {
            let slice = bitmap.downcast_ref::<Self>();
            let or_none = || bitmap.downcast_ref::<Option<Self>>()?.as_ref();
            slice.or_else(or_none).cloned()
        };
        let slices: Vec<_> = memory
            .iter()
            .map(|region| slice_of((**region).bitmap()))
            .collect();
        let Some(bitmap) = slices.iter().flatten().next().map(|first| &first.bitmap) else {
            return Ok(None);
        };
        let mut expected = 0;
        for (region, slice) in memory.iter().zip(&slices) {
            let guest_start = region.start_addr().0;
            match slice {
                None => return Err(SliceError::NoSlice { guest_start }),
                Some(slice) if !Arc::ptr_eq(&slice.bitmap, bitmap) => {
                    return Err(SliceError::OtherBitmap { guest_start });
                }
                Some(slice) if slice.offset as u64 != expected => {
                    return Err(SliceError::Offset {
                        guest_start,
                        offset: slice.offset as u64,
                        expected,
                    });
                }
                Some(_) => expected += region.len(),
            }
        }
        match expected == bitmap.ram_size() {
            true => Ok(Some(Arc::clone(bitmap))),
            false => Err(SliceError::Size {
                memory_size: expected,
                ram_size: bitmap.ram_size(),
            }),
        }
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

/// An error for guest memory whose regions do not mark their pages of one bitmap.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SliceError {
    /// A region has no slice, unlike others.
    #[error(
        "the region at {guest_start:#x} has no slice of the bitmap, and others have one: give each \
         region its slice (`DirtyBitmapSlice::of_regions`)"
    )]
    NoSlice {
        /// The guest-physical address of the region.
        guest_start: u64,
    },
    /// The slice of a region is of another bitmap than that of the first region.
    #[error(
        "the region at {guest_start:#x} marks another bitmap than the first region: create one \
         bitmap of all regions (`DirtyBitmapSlice::of_regions`)"
    )]
    OtherBitmap {
        /// The guest-physical address of the region.
        guest_start: u64,
    },
    /// The slice of a region has another offset than the region has in the memory file.
    #[error(
        "the region at {guest_start:#x} marks the bitmap from the offset {offset:#x} on, and its \
         pages are at {expected:#x}: create the slices by `DirtyBitmapSlice::of_regions`"
    )]
    Offset {
        /// The guest-physical address of the region.
        guest_start: u64,
        /// The offset of the slice.
        offset: u64,
        /// The offset of the region in the memory file: the size of all regions before it.
        expected: u64,
    },
    /// The memory has another size than the RAM of the bitmap.
    #[error(
        "the guest memory has {memory_size} bytes and its bitmap covers {ram_size}: create a bitmap \
         of the whole memory, without the gaps between its regions"
    )]
    Size {
        /// The size of all regions in bytes.
        memory_size: u64,
        /// The size that the bitmap covers, in bytes.
        ram_size: u64,
    },
}
