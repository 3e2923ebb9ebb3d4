//! The options of guest RAM, and its creation.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use dirty_bitmap::DirtyBitmap;
use page_reader::{RamLayout, RamRange};

use super::GuestRam;
use super::error::{BitmapMismatch, GuestRamError};
use crate::linux::sys::{self, Mapping};

/// Options of guest RAM: [`GuestRam::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `allocate` or `adopt`"]
pub struct GuestRamOptions {
    memfd: Option<String>,
    huge_pages: bool,
    dirty: Option<Arc<DirtyBitmap>>,
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

    /// Asks the host for huge pages (`MADV_HUGEPAGE`), subject to
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled`. The dirty log still counts small pages.
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Marks host writes in this bitmap, instead of in a new one with pages of the host's size.
    ///
    /// The bitmap must cover the memory file: it must start at 0 and be as large as the RAM. If the
    /// layout has one region, the bitmap may also start at the region's guest-physical address.
    pub fn dirty_bitmap(mut self, dirty: Arc<DirtyBitmap>) -> Self {
        self.dirty = Some(dirty);
        self
    }

    /// Allocates the RAM.
    ///
    /// # Errors
    /// [`GuestRamError`]. Nothing stays mapped.
    pub fn allocate(self, layout: RamLayout) -> Result<GuestRam, GuestRamError> {
        let dirty = self.checked_bitmap(&layout)?;
        let failed = |call: &'static str| {
            let size = layout.ram_size();
            move |errno: nix::Error| GuestRamError::Allocate {
                call,
                size,
                source: errno.into(),
            }
        };
        let memfd = match self.memfd.as_deref() {
            Some(name) => {
                Some(sys::sealed_memfd(name, layout.ram_size()).map_err(failed("memfd_create"))?)
            }
            None => None,
        };
        let map = |region: &RamRange| {
            let len = usize::try_from(region.size).unwrap_or(usize::MAX);
            let file = memfd.as_ref().map(|memfd| (memfd, region.offset));
            let mapping = Mapping::new(len, region.guest_start, file).map_err(failed("mmap"))?;
            if self.huge_pages {
                mapping.advise_huge_pages().map_err(failed("madvise"))?;
            }
            Ok(mapping)
        };
        let mappings: Result<_, GuestRamError> = layout.regions().iter().map(map).collect();
        Ok(GuestRam {
            mappings: mappings?,
            layout,
            memfd,
            dirty,
            log: Mutex::default(),
        })
    }

    /// Uses memory that the caller has mapped: one host address for each region, in the layout's
    /// order. Of these options, only the bitmap applies.
    ///
    /// # Errors
    /// [`GuestRamError`], for example unless there is one page-aligned address for each region.
    ///
    /// # Safety
    /// As long as the [`GuestRam`] exists, and with it every [`RamSlots`](crate::RamSlots) made
    /// from it:
    /// - each range, from its address and as long as its region, stays mapped, readable and
    ///   writable, and a file behind it isn't truncated;
    /// - no Rust reference covers any of it, and Rust code of this process accesses it through raw
    ///   pointers by atomic or volatile operations only.
    #[allow(unsafe_code)]
    pub unsafe fn adopt(
        self,
        layout: RamLayout,
        host_addresses: &[NonNull<u8>],
    ) -> Result<GuestRam, GuestRamError> {
        let dirty = self.checked_bitmap(&layout)?;
        if host_addresses.len() != layout.regions().len() {
            return Err(GuestRamError::AddressCount {
                given: host_addresses.len(),
                regions: layout.regions().len(),
            });
        }
        let page_size = sys::page_size();
        if let Some(misaligned) = host_addresses
            .iter()
            .find(|address| !(address.addr().get() as u64).is_multiple_of(page_size))
        {
            return Err(GuestRamError::MisalignedAddress {
                address: misaligned.addr().get(),
                page_size,
            });
        }
        let mappings = layout
            .regions()
            .iter()
            .zip(host_addresses)
            // SAFETY: this function requires of its caller what `Mapping::adopt` requires.
            .map(|(region, address)| unsafe { Mapping::adopt(*address, region.size as usize) })
            .collect();
        Ok(GuestRam {
            mappings,
            layout,
            memfd: None,
            dirty,
            log: Mutex::default(),
        })
    }

    /// Checks the layout as far as possible without memory, and returns the bitmap to use.
    fn checked_bitmap(&self, layout: &RamLayout) -> Result<Arc<DirtyBitmap>, GuestRamError> {
        let page_size = sys::page_size();
        if let Some(region) = layout
            .regions()
            .iter()
            .find(|region| !(region.guest_start | region.size).is_multiple_of(page_size))
        {
            return Err(GuestRamError::MisalignedRegion {
                guest_start: region.guest_start,
                size: region.size,
                page_size,
            });
        }
        match &self.dirty {
            Some(dirty) => {
                check_bitmap(layout, dirty)?;
                Ok(Arc::clone(dirty))
            }
            None => DirtyBitmap::new(0, layout.ram_size(), page_size)
                .map(Arc::new)
                .map_err(GuestRamError::Bitmap),
        }
    }
}

/// Checks that `bitmap` covers the memory file from its own start on.
fn check_bitmap(layout: &RamLayout, bitmap: &DirtyBitmap) -> Result<(), BitmapMismatch> {
    let (start, regions) = (bitmap.ram_start(), layout.regions());
    let starts_right = start == 0 || regions.len() == 1 && start == regions[0].guest_start;
    if starts_right && bitmap.ram_size() == layout.ram_size() {
        Ok(())
    } else {
        Err(BitmapMismatch {
            bitmap_start: start,
            bitmap_size: bitmap.ram_size(),
            ram_size: layout.ram_size(),
        })
    }
}
