//! RAM in memory that another value owns, which lives as long as the RAM.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use page_reader::{PageReader, RamLayout};

use crate::errors::GuestRamError;
use crate::mapping::Mapping;
use crate::options::{BitmapKind, GuestRamOptions};
use crate::owner::RamOwner;
use crate::ram::GuestRam;

impl<K: BitmapKind> GuestRam<K> {
    /// Uses the memory of `owner`, which holds the memory file of this layout. The owner is dropped
    /// after the RAM.
    ///
    /// The bitmap is new and clean, in pages of the host's size: what `owner` holds is the baseline
    /// of the next diff.
    ///
    /// A balloon must not discard memory that maps images (`MappedChain`, `MappedImage`): after
    /// `madvise(MADV_DONTNEED)` it has the bytes of the images again. Let it write zeros instead.
    ///
    /// # Errors
    /// Returns the errors of [`GuestRamOptions::own`].
    pub fn from_owner(layout: RamLayout, owner: impl RamOwner) -> Result<Self, GuestRamError> {
        Self::options().own(layout, owner)
    }
}

impl<K: BitmapKind> GuestRamOptions<K> {
    /// Uses the memory of `owner`, which holds the memory file of this layout. The owner is dropped
    /// after the RAM.
    ///
    /// # Errors
    /// Returns [`GuestRamError`]: [`MappingSize`](GuestRamError::MappingSize) if the memory of a
    /// region is not contiguous or not complete,
    /// [`LargerOwner`](GuestRamError::LargerOwner) if `owner` has more memory than the layout, and
    /// [`OtherAddresses`](GuestRamError::OtherAddresses) if it
    /// [states](PageReader::ram_layout) other addresses.
    pub fn own(
        &self,
        layout: RamLayout,
        owner: impl RamOwner,
    ) -> Result<GuestRam<K>, GuestRamError> {
        let owner = Arc::new(owner);
        let ram_size = layout.ram_size();
        if let Some(stated) = owner.ram_layout()
            && stated.ram_size() == ram_size
            && stated.addresses().ne(layout.addresses())
        {
            return Err(GuestRamError::OtherAddresses {
                owner: stated.clone(),
                layout,
            });
        }
        if owner.host_memory(ram_size, 1).is_some() {
            return Err(GuestRamError::LargerOwner { ram_size });
        }
        let ram = self.map(layout, |region| {
            let too_small = |mapped| GuestRamError::MappingSize {
                guest_start: region.guest_start,
                size: region.size,
                mapped,
            };
            let len = usize::try_from(region.size).map_err(|_| too_small(0))?;
            let memory = owner.host_memory(region.offset, len);
            let memory = memory.ok_or_else(|| too_small(0))?;
            let start = NonNull::new(memory.as_ptr().cast_mut()).ok_or_else(|| too_small(0))?;
            if memory.len() != len {
                return Err(too_small(memory.len()));
            }
            // SAFETY: `RamOwner` makes the promises of `Mapping::new` for this memory until the
            // owner is dropped, which the mapping keeps.
            Ok(unsafe { Mapping::new(start, len, Arc::clone(&owner)) })
        })?;
        Ok(ram.owned_by(owner))
    }
}

#[cfg(feature = "vm-memory")]
mod guest_memory {
    use std::fmt;
    use std::sync::Arc;

    use page_reader::GuestMemoryReader;
    use vm_memory::GuestMemoryMmap;
    use vm_memory::bitmap::Bitmap;

    use super::{BitmapKind, GuestRam, GuestRamError};

    impl<K: BitmapKind> GuestRam<K> {
        /// Uses guest memory of the crate `vm-memory`, with the layout of its regions. The VMM and
        /// its devices use `memory` as before.
        ///
        /// A write through `memory` is not marked in the new bitmap of the RAM. Create `memory` as
        /// `GuestMemoryMmap<DirtyBitmapSlice>`, and pass the bitmap and a
        /// [`GuestMemoryReader`] to [`options`](Self::options) and
        /// [`own`](crate::GuestRamOptions::own); or call `mark_guest_memory` of the bitmap before
        /// each save.
        ///
        /// # Errors
        /// Returns [`GuestRamError`], for example unless each region consists of whole pages of the
        /// host.
        ///
        /// # Examples
        /// ```
        /// use std::sync::Arc;
        /// use guest_ram::GuestRam;
        /// use page_reader::PageReader;
        /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
        ///
        /// let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 20)];
        /// let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges)?);
        /// let ram: GuestRam = GuestRam::from_guest_memory(Arc::clone(&memory))?;
        ///
        /// memory.write_slice(b"device", GuestAddress(4 << 30))?;
        /// ram.mark(4 << 30, 6)?; // `memory` has no bitmap
        /// let mut bytes = [0; 6];
        /// ram.read_at(1 << 20, &mut bytes)?;
        /// assert_eq!(&bytes, b"device");
        /// # Ok::<(), Box<dyn std::error::Error>>(())
        /// ```
        pub fn from_guest_memory<B: Bitmap + fmt::Debug + Send + Sync + 'static>(
            memory: Arc<GuestMemoryMmap<B>>,
        ) -> Result<Self, GuestRamError> {
            let owner = GuestMemoryReader::new(memory).map_err(GuestRamError::Layout)?;
            Self::from_owner(owner.layout().clone(), owner)
        }
    }
}
