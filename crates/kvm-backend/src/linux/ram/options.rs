//! The options of a KVM guest's RAM, and its allocation.

use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::{Logged, LoggedBitmap};
use guest_ram::{GuestRamError, RamOwner};
use page_reader::{RamLayout, RamRange};

use super::GuestRam;
use crate::linux::memory;

/// A builder for guest RAM, returned by [`GuestRam::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `allocate`, `own` or `adopt`"]
pub struct GuestRamOptions {
    ram: guest_ram::GuestRamOptions<Logged>,
    memfd: Option<String>,
    huge_pages: bool,
}

impl GuestRamOptions {
    /// Backs the RAM with one memory file of this name (shown in `/proc/self/maps`), which other
    /// processes can map: vhost-user devices, a page server. Its size is sealed. With it, a process
    /// without privileges can find the pages that were never touched
    /// ([`populated`](page_reader::PageReader::populated)). With other shared memory that takes
    /// `CAP_CHECKPOINT_RESTORE`.
    ///
    /// # Examples
    /// ```
    /// use kvm_backend::GuestRam;
    /// use page_reader::{PageReader, RamLayout};
    ///
    /// let layout = RamLayout::new([(0, 4 << 20), (1 << 32, 4 << 20)])?;
    /// let ram = GuestRam::options().memfd("ram").allocate(layout)?;
    /// ram.write(1 << 32, b"kernel")?;
    /// let first = ram.populated(0..8 << 20).next();
    /// assert_eq!(first.map(|range| range.start), Some(4 << 20)); // nothing in the low region
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn memfd(mut self, name: impl Into<String>) -> Self {
        self.memfd = Some(name.into());
        self
    }

    /// Sets whether the host is asked for huge pages (`MADV_HUGEPAGE`), subject to
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`. The dirty log still counts small pages.
    pub fn huge_pages(mut self, huge_pages: bool) -> Self {
        self.huge_pages = huge_pages;
        self
    }

    /// Marks host writes in this bitmap, instead of in a new one with pages of the host's size.
    /// [`LoggedBitmap::logged`] creates it.
    ///
    /// The bitmap must cover the memory file: it must start at 0 and be as large as the RAM. If the
    /// layout has one region, the bitmap may also start at the region's guest-physical address.
    pub fn dirty_bitmap(mut self, dirty: Arc<LoggedBitmap>) -> Self {
        self.ram = self.ram.dirty_bitmap(dirty);
        self
    }

    /// Allocates the RAM.
    ///
    /// # Errors
    /// Returns [`GuestRamError`]. Nothing stays mapped.
    pub fn allocate(&self, layout: RamLayout) -> Result<GuestRam, GuestRamError> {
        self.ram.check(&layout)?;
        let size = layout.ram_size();
        let failed = |call: &'static str| {
            move |errno: nix::Error| GuestRamError::Allocate {
                call,
                size,
                source: errno.into(),
            }
        };
        let memfd = match self.memfd.as_deref() {
            Some(name) => Some(memory::sealed_memfd(name, size).map_err(failed("memfd_create"))?),
            None => None,
        };
        let map = |region: &RamRange| {
            let len = usize::try_from(region.size).unwrap_or(usize::MAX);
            let file = memfd.as_ref().map(|memfd| (memfd, region.offset));
            let mapping =
                memory::map_shared(len, region.guest_start, file).map_err(failed("mmap"))?;
            if self.huge_pages {
                memory::advise_huge_pages(&mapping).map_err(failed("madvise"))?;
            }
            Ok::<_, GuestRamError>(mapping)
        };
        let ram = self.ram.map(layout, map)?;
        Ok(GuestRam::over(ram, memfd))
    }

    /// Uses the memory of `owner`, as [`guest_ram::GuestRamOptions::own`] does. Of these options,
    /// only the bitmap applies.
    ///
    /// # Errors
    /// Returns [`GuestRamError`].
    ///
    /// # Examples
    /// Guest memory of the crate `vm-memory`, whose writes mark the same bitmap:
    /// ```
    /// use std::sync::Arc;
    /// use dirty_bitmap::{DirtyBitmapSlice, LoggedBitmap};
    /// use kvm_backend::GuestRam;
    /// use page_reader::GuestMemoryReader;
    /// use vm_memory::mmap::MmapRegionBuilder;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
    ///
    /// let bitmap = Arc::new(LoggedBitmap::logged(0, 1 << 20, 4096)?);
    /// let slice = DirtyBitmapSlice::new(bitmap, 0, 1 << 20)?;
    /// let mapping = MmapRegionBuilder::new_with_bitmap(1 << 20, slice)
    ///     .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
    ///     .with_mmap_flags(
    ///         nix::libc::MAP_ANONYMOUS | nix::libc::MAP_PRIVATE | nix::libc::MAP_NORESERVE,
    ///     )
    ///     .build()?;
    /// let region = GuestRegionMmap::new(mapping, GuestAddress(0)).ok_or("too large")?;
    /// let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region])?);
    ///
    /// let owner = GuestMemoryReader::new(Arc::clone(&memory))?;
    /// let ram = GuestRam::options().own(owner.layout().clone(), owner)?;
    /// memory.write_obj(7_u32, GuestAddress(0x3000))?; // a device
    /// assert!(ram.dirty_bitmap().is_dirty(0x3000)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn own(&self, layout: RamLayout, owner: impl RamOwner) -> Result<GuestRam, GuestRamError> {
        Ok(GuestRam::from(self.ram.own(layout, owner)?))
    }

    /// Uses memory that the caller has mapped: one host address for each region, in the order of
    /// [`RamLayout::regions`], which is that of the guest-physical starts. Of these
    /// options, only the bitmap applies.
    ///
    /// # Errors
    /// Returns [`GuestRamError`], for example unless there is one page-aligned address for each
    /// region.
    ///
    /// # Safety
    /// As for [`guest_ram::GuestRamOptions::adopt`]. Every [`RamSlots`](crate::RamSlots) made from
    /// the RAM is a registration with a hypervisor.
    #[allow(unsafe_code)]
    pub unsafe fn adopt(
        &self,
        layout: RamLayout,
        host_addresses: &[NonNull<u8>],
    ) -> Result<GuestRam, GuestRamError> {
        // SAFETY: this function requires of its caller what `adopt` requires.
        let ram = unsafe { self.ram.adopt(layout, host_addresses) }?;
        Ok(GuestRam::over(ram, None))
    }
}
