//! The guest memory of the `vm-memory` crate as a restore target.

#![allow(unsafe_code)]

use std::io;
use std::ops::Deref;

use page_reader::{GuestMemoryReader, LayoutError, RamLayout};
use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{RamTarget, TargetMemory};

/// A guest's RAM in one of `vm-memory`'s types, such as `GuestMemoryMmap`, as a restore target.
///
/// `P` dereferences to the memory: `&GuestMemoryMmap`, `Arc<GuestMemoryMmap>`, or the guard of a
/// `GuestMemoryAtomic`.
///
/// A restore marks no page in the bitmap of the memory. This is right before the guest runs, when
/// the restored snapshot is the parent of the next diff. Otherwise mark all of the RAM afterwards.
///
/// Images are read into the memory without a copy, unless `vm-memory` is built with its feature
/// `xen`.
///
/// # Examples
/// ```
/// use memory_image::{Chain, GuestMemoryTarget};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
/// # let dir = tempfile::tempdir()?;
/// # let full = dir.path().join("full.mem");
/// # std::fs::write(&full, vec![7; 12288])?;
///
/// let ranges = [(GuestAddress(0), 8192), (GuestAddress(4 << 30), 4096)];
/// let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
/// Chain::open_raw(&full, 4096)?.restore(&mut GuestMemoryTarget::new(&memory)?)?;
/// assert_eq!(memory.read_obj::<u8>(GuestAddress(4 << 30))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a target has no effect until it is passed to a restore"]
pub struct GuestMemoryTarget<P> {
    memory: P,
    layout: RamLayout,
}

impl<P> GuestMemoryTarget<P>
where
    P: Deref,
    P::Target: GuestMemoryBackend,
{
    /// Creates a target of `memory`, whose regions are laid out as in [`RamLayout`].
    ///
    /// # Errors
    /// Returns an error if there is no region, or if a region is not whole pages of 4 KiB.
    pub fn new(memory: P) -> Result<Self, LayoutError> {
        let layout = GuestMemoryReader::new(&*memory)?.layout().clone();
        Ok(Self { memory, layout })
    }

    /// Returns the layout of the RAM in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Passes the memory of the longest part of these bytes in one region to `use_memory`.
    fn with_memory<R>(
        &self,
        offset: u64,
        len: usize,
        use_memory: impl FnOnce(TargetMemory<'_>) -> R,
    ) -> Option<R> {
        let rest = self.layout.ram_size().checked_sub(offset)?;
        let mut pieces = self
            .layout
            .offset_pieces(offset, rest.min(len as u64))
            .ok()?;
        let piece = pieces.next()?;
        let address = GuestAddress(piece.guest_start);
        let slice = self.memory.get_slice(address, piece.size as usize).ok()?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: a VolatileSlice promises that the memory is mapped and writable, and accessed by
        // volatile operations only, for as long as the slice lives. The guard, which may own the
        // mapping, outlives the use.
        Some(use_memory(unsafe {
            TargetMemory::shared(guard.as_ptr(), slice.len())
        }))
    }
}

impl<P> RamTarget for GuestMemoryTarget<P>
where
    P: Deref,
    P::Target: GuestMemoryBackend,
{
    fn ram_size(&self) -> u64 {
        self.layout.ram_size()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(&self.layout)
    }

    fn write_at(&mut self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.with_memory(offset, bytes.len(), |mut memory| {
                memory.write(&bytes[..memory.len()]);
                memory.len()
            });
            let written = written.ok_or(io::ErrorKind::WriteZero)?;
            (offset, bytes) = (offset + written as u64, &bytes[written..]);
        }
        Ok(())
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        // A guard with drop glue unmaps the memory, so its address would dangle.
        if const { std::mem::needs_drop::<PtrGuardMut>() } {
            return None;
        }
        let (start, len) = self.with_memory(offset, len, |it| (it.as_ptr(), it.len()))?;
        // SAFETY: as in `with_memory`. The lifetime of the slice is that of the borrow of `self`. A
        // guard without drop glue is only an address, which is valid for as long as the slice.
        Some(unsafe { TargetMemory::shared(start, len) })
    }
}
