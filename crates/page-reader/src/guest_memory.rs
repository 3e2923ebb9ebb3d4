//! The guest memory of the `vm-memory` crate as a source.

#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;

use host_memory::{HostMemory, available_len, check_range};
use vm_memory::volatile_memory::PtrGuard;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, bitmap::MS,
};

use crate::layout::{LayoutError, RamLayout};
use crate::reader::PageReader;

/// A guest's RAM in one of `vm-memory`'s types, such as `GuestMemoryMmap`, borrowed or shared.
///
/// `P` dereferences to the memory: `&GuestMemoryMmap`, `Arc<GuestMemoryMmap>`, or the guard of a
/// `GuestMemoryAtomic`, whose memory does not change while it is held.
///
/// Host addresses are available, unless `vm-memory` is built with its feature `xen`: memory that is
/// mapped for a single access has no lasting address, so it is read by copy.
///
/// <div class="warning">
///
/// This source reads memory, and does not know which pages changed. Your devices' writes through
/// `vm-memory` are not in the hypervisor's dirty log: a diff of that log lacks them, and nothing
/// reports it. Create the memory as `GuestMemoryMmap<DirtyBitmapSlice>`, which marks each write, or
/// call `DirtyBitmap::mark_guest_memory` before each save (crate `dirty-bitmap`, feature
/// `vm-memory`).
///
/// </div>
///
/// # Examples
/// ```
/// use page_reader::{GuestMemoryReader, PageReader};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = [(GuestAddress(0), 8192), (GuestAddress(1 << 32), 4096)];
/// let memory = GuestMemoryMmap::<()>::from_ranges(&ram)?;
/// memory.write_slice(b"high", GuestAddress(1 << 32))?;
///
/// let guest = GuestMemoryReader::new(&memory)?;
/// assert_eq!(guest.layout().ram_size(), 12288);
/// let mut bytes = [0; 4];
/// guest.read_at(8192, &mut bytes)?;
/// assert_eq!(&bytes, b"high");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GuestMemoryReader<P> {
    memory: P,
    layout: RamLayout,
}

impl<P> GuestMemoryReader<P>
where
    P: Deref,
    P::Target: GuestMemoryBackend,
{
    /// Returns a reader for `memory`, whose regions are laid out as in [`RamLayout`].
    ///
    /// # Errors
    /// Returns an error if there is no region, or if a region is not whole pages of 4 KiB.
    /// `vm-memory` accepts any size, memory slots do not.
    pub fn new(memory: P) -> Result<Self, LayoutError> {
        let layout = RamLayout::new(
            memory
                .iter()
                .map(|region| (region.start_addr().raw_value(), region.len())),
        )?;
        Ok(Self { memory, layout })
    }

    /// Returns the layout of the RAM in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the memory.
    #[must_use]
    pub fn memory(&self) -> &P {
        &self.memory
    }
}

/// Returns `len` bytes inside one region.
fn slice<M: GuestMemoryBackend + ?Sized>(
    memory: &M,
    guest_start: u64,
    len: usize,
) -> Result<vm_memory::VolatileSlice<'_, MS<'_, M>>, GuestMemoryError> {
    let slice = memory.get_slice(GuestAddress(guest_start), len)?;
    if slice.len() == len {
        Ok(slice)
    } else {
        let completed = slice.len();
        Err(GuestMemoryError::PartialBuffer {
            expected: len,
            completed,
        })
    }
}

impl<P> PageReader for GuestMemoryReader<P>
where
    P: Deref,
    P::Target: GuestMemoryBackend,
{
    fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.layout.ram_size())?;
        for piece in self.layout.pieces(offset, buf.len() as u64) {
            // At most the length of buf, so it fits in usize.
            let (now, later) = buf.split_at_mut(piece.size as usize);
            let slice =
                slice(&*self.memory, piece.guest_start, now.len()).map_err(io::Error::other)?;
            let guard = slice.ptr_guard();
            // SAFETY: a VolatileSlice promises that the memory is mapped, and accessed by volatile
            // operations only, for as long as the slice lives. The guard, which may own the
            // mapping, outlives the copy.
            unsafe { HostMemory::new(guard.as_ptr(), now.len()) }.copy_to(now);
            buf = later;
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        // A guard with drop glue unmaps the memory, so its address would dangle.
        if const { std::mem::needs_drop::<PtrGuard>() } {
            return None;
        }
        let len = available_len(offset, len, self.layout.ram_size())?;
        let piece = self.layout.pieces(offset, len as u64).next()?;
        let slice = slice(&*self.memory, piece.guest_start, piece.size as usize).ok()?;
        let start = slice.ptr_guard().as_ptr();
        // SAFETY: as in read_at. The lifetime of the slice is that of the borrow of `self`. A guard
        // without drop glue is only an address, which is valid for as long as the slice.
        Some(unsafe { HostMemory::new(start, slice.len()) })
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(&self.layout)
    }
}
