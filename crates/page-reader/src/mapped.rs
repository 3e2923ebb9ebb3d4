//! Guest memory that this process has mapped.

use std::io;

use crate::{HostMemory, PageReader, RamLayout, range};

/// A guest's RAM as it's mapped into this process: what a monitor gives to KVM or the Hypervisor framework.
///
/// Host addresses are handed out, so nothing needs to be copied; where it is, it's by
/// [`HostMemory::copy_to`], which vCPUs may race with.
///
/// Shared memory that another process is still filling by userfaultfd reads as zeros where pages are
/// missing. On Linux, `MappedMemory::check_filled` finds such a process: call it before and after
/// the copy.
///
/// # Examples
/// A guest of two regions. The promise that the memory stays mapped is made once for each, in [`HostMemory::new`].
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
/// let regions = unsafe { [HostMemory::new(low.as_ptr(), 8192), HostMemory::new(high.as_ptr(), 4096)] };
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

/// Host memory that doesn't fit the layout it was given for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappedMemoryError {
    /// Not as many ranges of host memory as RAM regions.
    #[error(
        "{mapped} ranges of host memory for {regions} RAM regions: give one for each region, in ascending \
         guest-physical order"
    )]
    RegionCount {
        /// Ranges of host memory given.
        mapped: usize,
        /// Regions in the layout.
        regions: usize,
    },
    /// A range of host memory isn't as large as its region.
    #[error(
        "{mapped:#x} bytes of host memory for the RAM region at {guest_start:#x} of {size:#x} bytes: give the regions' \
         memory in ascending guest-physical order"
    )]
    RegionSize {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The bytes of host memory given.
        mapped: usize,
    },
}

impl<'a> MappedMemory<'a> {
    /// The guest whose RAM is laid out as `layout`, each region in the host memory at the same place of `regions`.
    ///
    /// # Errors
    /// Not one range of host memory for each [region](RamLayout::regions), in ascending guest-physical order, of its
    /// size.
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

    /// Where the regions lie in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The memory of `len` bytes from `offset` on, piece by piece; the range is known to be RAM.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = HostMemory<'a>> {
        self.layout.pieces(offset, len as u64).map(|piece| {
            let region = self.layout.regions()[piece.region];
            // Both fit in usize: they're inside a range of host memory.
            let start = (piece.offset - region.offset) as usize;
            self.regions[piece.region].slice(start..start + piece.size as usize)
        })
    }
}

impl PageReader for MappedMemory<'_> {
    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        range::check(offset, buf.len(), self.layout.ram_size())?;
        for memory in self.pieces(offset, buf.len()) {
            let (now, later) = buf.split_at_mut(memory.len());
            memory.copy_to(now);
            buf = later;
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = range::available(offset, len, self.layout.ram_size())?;
        self.pieces(offset, len).next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn regions_follow_the_layout_and_not_the_host_addresses() {
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
    fn host_memory_that_does_not_fit_the_layout_is_refused() {
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
