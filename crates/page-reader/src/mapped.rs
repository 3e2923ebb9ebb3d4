//! Guest memory that is mapped in this process.

use std::io;

use host_memory::{HostMemory, available_len, check_range};

use crate::layout::RamLayout;
use crate::reader::PageReader;

/// A guest's RAM as mapped in this process: the memory that a VMM gives to KVM or the Hypervisor
/// framework.
///
/// Host addresses are available, so no copy is required. Copies are made by
/// [`HostMemory::copy_to`], which tolerates concurrent writes by vCPUs.
///
/// Shared memory that another process still fills by userfaultfd reads as zeros where pages are
/// missing. On Linux, `MappedMemory::check_filled` finds such a process; call it before and after
/// the copy.
///
/// # Examples
/// A guest with two regions. [`HostMemory::new`] carries the promise that the memory stays mapped,
/// once for each region.
/// ```
/// use page_reader::{HostMemory, MappedMemory, PageReader, RamLayout};
/// # struct Mapping(Vec<std::sync::atomic::AtomicU8>);
/// # impl Mapping {
/// #     fn new(size: usize) -> Self { Self((0..size).map(|_| 7.into()).collect()) }
/// #     fn as_ptr(&self) -> *const u8 { self.0.as_ptr().cast() }
/// # }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layout = RamLayout::new([(0, 8192), (1 << 32, 4096)])?;
/// let (low, high) = (Mapping::new(8192), Mapping::new(4096));
///
/// // SAFETY: both mappings live until the end of the function, and after `guest`.
/// let regions = unsafe {
///     [
///         HostMemory::new(low.as_ptr(), 8192),
///         HostMemory::new(high.as_ptr(), 4096),
///     ]
/// };
/// let guest = MappedMemory::new(layout, regions)?;
///
/// let mut byte = [0];
/// guest.read_at(8192, &mut byte)?; // the first byte at 4 GiB
/// assert_eq!(byte, [7]);
/// assert_eq!(guest.host_memory(8192, 4096).unwrap().as_ptr(), high.as_ptr());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MappedMemory<'a> {
    layout: RamLayout,
    regions: Box<[HostMemory<'a>]>,
}

/// A mismatch between host memory and RAM layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappedMemoryError {
    /// The number of host memory ranges differs from the number of RAM regions.
    #[error(
        "the number of host memory ranges ({mapped}) is not that of the RAM regions ({regions}): \
         give one range for each region, in ascending guest-physical order"
    )]
    RegionCount {
        /// The number of host memory ranges given.
        mapped: usize,
        /// The number of regions in the layout.
        regions: usize,
    },
    /// A host memory range and its RAM region differ in size.
    #[error(
        "{mapped} bytes of host memory do not match the RAM region at {guest_start:#x} of \
         {size} bytes: give the memory of the regions in ascending guest-physical order"
    )]
    RegionSize {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// The size of the region in bytes.
        size: u64,
        /// The size of the host memory range in bytes.
        mapped: usize,
    },
}

impl<'a> MappedMemory<'a> {
    /// Returns a reader for RAM with the given `layout`, whose regions are mapped at `regions`.
    ///
    /// # Errors
    /// Returns an error unless `regions` has one range of equal size for each
    /// [region](RamLayout::regions), in ascending guest-physical order.
    pub fn new(
        layout: RamLayout,
        regions: impl IntoIterator<Item = HostMemory<'a>>,
    ) -> Result<Self, MappedMemoryError> {
        let mapped: Box<[_]> = regions.into_iter().collect();
        if mapped.len() != layout.regions().len() {
            return Err(MappedMemoryError::RegionCount {
                mapped: mapped.len(),
                regions: layout.regions().len(),
            });
        }
        for (region, memory) in layout.regions().iter().zip(&mapped) {
            if region.size != memory.len() as u64 {
                return Err(MappedMemoryError::RegionSize {
                    guest_start: region.guest_start,
                    size: region.size,
                    mapped: memory.len(),
                });
            }
        }
        Ok(Self {
            layout,
            regions: mapped,
        })
    }

    /// Returns the layout of the RAM in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the host memory of `len` bytes at `offset`, piece by piece. The range must be inside
    /// the RAM.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = HostMemory<'a>> {
        self.layout.pieces(offset, len as u64).map(|piece| {
            let region = self.layout.regions()[piece.region];
            // Both are inside a range of host memory, so they fit in usize.
            let start = (piece.offset - region.offset) as usize;
            self.regions[piece.region].slice(start..start + piece.size as usize)
        })
    }
}

impl PageReader for MappedMemory<'_> {
    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.layout.ram_size())?;
        for memory in self.pieces(offset, buf.len()) {
            let (now, later) = buf.split_at_mut(memory.len());
            memory.copy_to(now);
            buf = later;
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = available_len(offset, len, self.layout.ram_size())?;
        self.pieces(offset, len).next()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(&self.layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn regions_are_ordered_by_layout_not_by_host_address() {
        let both = [[1; PAGE], [2; PAGE]];
        let layout = RamLayout::new([(0, 4096), (1 << 32, 4096)]).unwrap();
        let swapped = [HostMemory::from(&both[1][..]), (&both[0][..]).into()];
        let guest = MappedMemory::new(layout, swapped).unwrap();
        let mut buf = [0; 2];
        guest.read_at(PAGE as u64 - 1, &mut buf).unwrap();
        assert_eq!(buf, [2, 1]);
        let border = guest.host_memory(PAGE as u64 - 1, 100).unwrap();
        assert_eq!(border.len(), 1, "host memory ends with its region");
        assert_eq!(border.as_ptr(), &raw const both[1][PAGE - 1]);
    }

    #[test]
    fn host_memory_that_differs_from_the_layout_is_refused() {
        let bytes = [0; 3 * PAGE];
        let memory = HostMemory::from(&bytes[..]);
        let layout = RamLayout::new([(0, 4096), (0x10000, 8192)]).unwrap();
        assert_eq!(
            MappedMemory::new(layout.clone(), [memory]).unwrap_err(),
            MappedMemoryError::RegionCount {
                mapped: 1,
                regions: 2
            }
        );
        let (first, second) = memory.split_at(2 * PAGE);
        assert_eq!(
            MappedMemory::new(layout, [first, second]).unwrap_err(),
            MappedMemoryError::RegionSize {
                guest_start: 0,
                size: 4096,
                mapped: 2 * PAGE
            }
        );
    }
}
