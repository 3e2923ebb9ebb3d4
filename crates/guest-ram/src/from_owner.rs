//! RAM in memory that another value owns, which lives as long as the RAM.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::ParentImage;
use page_reader::RamLayout;

use crate::errors::GuestRamError;
use crate::mapping::Mapping;
use crate::options::{BitmapKind, GuestRamOptions};
use crate::owner::RamOwner;
use crate::ram::GuestRam;

impl<K: BitmapKind> GuestRam<K> {
    /// Uses the memory of `owner`, which holds the memory file of this layout. The owner is dropped
    /// after the RAM.
    ///
    /// The [image](RamOwner::image) of `owner` is the parent of the next diff: a diff that names
    /// another one is refused. What was [written through `owner`](RamOwner::mark_writes) since is
    /// marked. The caller [marks](Self::mark) what was written by address, and what was discarded.
    /// The bitmap is that of `owner` if it [has one](RamOwner::own_bitmap), and otherwise new, in
    /// pages of the host's size.
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
    /// [states](page_reader::PageReader::ram_layout) other addresses. The bitmap of an owner that
    /// [has one](RamOwner::own_bitmap) is used, and any other in these options is
    /// [`OtherBitmap`](GuestRamError::OtherBitmap), or [`BitmapKind`](GuestRamError::BitmapKind).
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
        let options = self.with_bitmap_of(&*owner)?;
        let ram = options.map(layout, |region| {
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
        match owner.image() {
            ParentImage::Unknown => {}
            image @ (ParentImage::Raw | ParentImage::Id(_)) => ram.dirty_bitmap().set_parent(image),
        }
        let ram = ram.owned_by(owner);
        ram.mark_owner_writes();
        Ok(ram)
    }

    /// Returns these options with the bitmap of the owner, if it has one: marks in another bitmap
    /// would not be those of the RAM.
    fn with_bitmap_of(&self, owner: &impl RamOwner) -> Result<Self, GuestRamError> {
        let Some(bitmap) = owner.own_bitmap()? else {
            return Ok(self.clone());
        };
        let bitmap = K::of_owner(bitmap).ok_or(GuestRamError::BitmapKind)?;
        match &self.dirty {
            Some(other) if !Arc::ptr_eq(other, &bitmap) => Err(GuestRamError::OtherBitmap),
            Some(_) | None => Ok(self.clone().dirty_bitmap(bitmap)),
        }
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
        /// The bitmap of a `GuestMemoryMmap<DirtyBitmapSlice<K>>` becomes that of the RAM, which
        /// then has the marks of all writes through `memory`. A write through other memory is not
        /// marked: call `mark_guest_memory` of the bitmap before each save (with KVM, pass that
        /// call to `DirtyLogOptions::mark_host_writes`) if `B` is an `AtomicBitmap`, and
        /// [`mark`](Self::mark) after each write otherwise.
        ///
        /// # Errors
        /// Returns [`GuestRamError`], for example unless each region consists of whole pages of the
        /// host. Returns [`GuestRamError::Slices`] if the regions have slices of several bitmaps or
        /// with other offsets than those of the regions, and [`GuestRamError::BitmapKind`] if the
        /// bitmap is not of the kind `K`.
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
