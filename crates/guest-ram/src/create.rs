//! Creation of guest RAM: what is checked, and how it is mapped.

use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::DirtyBitmap;
use page_reader::{RamLayout, RamRange};

use crate::errors::{BitmapMismatch, GuestRamError, MisalignedRegion};
use crate::mapping::{Mapping, host_page_size};
use crate::options::{BitmapKind, GuestRamOptions};
use crate::ram::GuestRam;

impl<K: BitmapKind> GuestRam<K> {
    /// Allocates RAM of this layout with a bitmap in pages of the host's size. The memory is
    /// anonymous and zero.
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if a region does not consist of whole pages of the host, or if
    /// memory can't be allocated.
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        Self::options().allocate(layout)
    }
}

impl<K: BitmapKind> GuestRamOptions<K> {
    /// Allocates RAM of this layout: private anonymous memory, which is zero. The host provides
    /// pages when they are touched.
    ///
    /// # Errors
    /// Returns [`GuestRamError`]. No memory stays mapped.
    pub fn allocate(&self, layout: RamLayout) -> Result<GuestRam<K>, GuestRamError> {
        self.map(layout, |region| {
            let len = usize::try_from(region.size).unwrap_or(usize::MAX);
            Mapping::anonymous(len).map_err(|source| GuestRamError::Allocate {
                call: "mmap",
                size: region.size,
                source,
            })
        })
    }

    /// Maps RAM of this layout by calling `map` for each region, in the order of the layout. A
    /// backend allocates its RAM in this way.
    ///
    /// The layout and the bitmap are checked before the first call. Each mapping must be as large
    /// as its region and start at a page boundary.
    ///
    /// # Errors
    /// Returns [`GuestRamError`], or the error of `map`. The mappings made so far are dropped.
    ///
    /// # Examples
    /// ```
    /// use guest_ram::{GuestRam, GuestRamError, Mapping};
    /// use page_reader::RamLayout;
    ///
    /// let layout = RamLayout::single(0, 1 << 20)?;
    /// let ram: GuestRam = GuestRam::options().map(layout, |region| {
    ///     let allocated = Mapping::anonymous(region.size as usize); // or your own way
    ///     allocated.map_err(|source| GuestRamError::Allocate {
    ///         call: "mmap",
    ///         size: region.size,
    ///         source,
    ///     })
    /// })?;
    /// assert_eq!(ram.layout().ram_size(), 1 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn map<E: From<GuestRamError>>(
        &self,
        layout: RamLayout,
        map: impl FnMut(&RamRange) -> Result<Mapping, E>,
    ) -> Result<GuestRam<K>, E> {
        self.map_in_pages(host_page_size(), layout, map)
    }

    /// Does what [`map`](Self::map) does on a host with pages of this size.
    fn map_in_pages<E: From<GuestRamError>>(
        &self,
        page_size: u64,
        layout: RamLayout,
        mut map: impl FnMut(&RamRange) -> Result<Mapping, E>,
    ) -> Result<GuestRam<K>, E> {
        self.check_in_pages(page_size, &layout)?;
        let dirty = match &self.dirty {
            Some(dirty) => Arc::clone(dirty),
            None => Arc::new(
                K::new_bitmap(layout.ram_size(), page_size).map_err(GuestRamError::Bitmap)?,
            ),
        };
        let mappings = layout.regions().iter().map(|region| {
            let mapping = map(region)?;
            check_mapping(region, &mapping, page_size)?;
            Ok(mapping)
        });
        let mappings = mappings.collect::<Result<_, E>>()?;
        Ok(GuestRam::new_checked(layout, mappings, dirty))
    }

    /// Uses memory that the caller has mapped. `host_addresses` has one address for each region, in
    /// the order of [`RamLayout::regions`]: ascending by guest-physical start, in whichever order
    /// the regions were passed to [`RamLayout::new`].
    ///
    /// # Errors
    /// Returns [`GuestRamError`], for example unless there is one page-aligned address for each
    /// region.
    ///
    /// # Safety
    /// While the [`GuestRam`] exists, and with it every registration with a hypervisor that was
    /// made from it:
    /// - Each range, from its address and as long as its region, stays mapped, readable and
    ///   writable. A file behind it is not truncated.
    /// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
    ///   pointers, with atomic or volatile operations.
    #[allow(unsafe_code)]
    pub unsafe fn adopt(
        &self,
        layout: RamLayout,
        host_addresses: &[NonNull<u8>],
    ) -> Result<GuestRam<K>, GuestRamError> {
        let (given, regions) = (host_addresses.len(), layout.regions().len());
        if given != regions {
            return Err(GuestRamError::AddressCount { given, regions });
        }
        self.map(layout, |region| {
            let len = usize::try_from(region.size).unwrap_or(usize::MAX);
            // SAFETY: the caller upholds the contract of `Mapping::new`, which is the same. The
            // mapping is a part of the returned value.
            Ok(unsafe { Mapping::new(host_addresses[region.region], len, ()) })
        })
    }

    /// Checks a layout and the bitmap without allocating memory.
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if a region does not consist of whole pages of the host, or if the
    /// bitmap does not cover the RAM.
    pub fn check(&self, layout: &RamLayout) -> Result<(), GuestRamError> {
        self.check_in_pages(host_page_size(), layout)
    }

    fn check_in_pages(&self, page_size: u64, layout: &RamLayout) -> Result<(), GuestRamError> {
        check_regions(layout, page_size)?;
        match &self.dirty {
            Some(dirty) => Ok(check_bitmap(layout, dirty)?),
            None => Ok(()),
        }
    }
}

/// Checks that the regions consist of whole pages.
fn check_regions(layout: &RamLayout, page_size: u64) -> Result<(), MisalignedRegion> {
    let aligned = |region: &RamRange| (region.guest_start | region.size).is_multiple_of(page_size);
    match layout.regions().iter().find(|region| !aligned(region)) {
        None => Ok(()),
        Some(region) => Err(MisalignedRegion {
            guest_start: region.guest_start,
            size: region.size,
            page_size,
        }),
    }
}

/// Checks that `bitmap` covers the memory file from its own start on.
fn check_bitmap<K>(layout: &RamLayout, bitmap: &DirtyBitmap<K>) -> Result<(), BitmapMismatch> {
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

/// Checks that a mapping consists of as many whole pages as its region.
fn check_mapping(
    region: &RamRange,
    mapping: &Mapping,
    page_size: u64,
) -> Result<(), GuestRamError> {
    let address = mapping.start().addr().get();
    if !(address as u64).is_multiple_of(page_size) {
        return Err(GuestRamError::MisalignedAddress { address, page_size });
    }
    if mapping.len() as u64 != region.size {
        return Err(GuestRamError::MappingSize {
            guest_start: region.guest_start,
            size: region.size,
            mapped: mapping.len(),
        });
    }
    Ok(())
}

/// The checks on hosts with pages of 4 and of 16 KiB, independent of the pages of this host.
#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use dirty_bitmap::Untracked;
    use rstest::rstest;

    use super::*;

    /// Returns `len` bytes of memory, `skip` bytes after a boundary of 16 KiB.
    fn mapping(skip: usize, len: usize) -> Mapping {
        let memory = Mapping::anonymous(len + skip + 16384).unwrap();
        let boundary = memory.start().as_ptr().align_offset(16384);
        let start = memory.start().map_addr(|start| {
            let start = start.checked_add(boundary + skip);
            start.expect("an address in the memory")
        });
        #[allow(unsafe_code)]
        // SAFETY: a part of the memory that is the owner. No reference to it exists.
        unsafe {
            Mapping::new(start, len, memory)
        }
    }

    #[rstest]
    fn ram_of_whole_pages_is_mapped(#[values(4096, 16384)] page_size: u64) {
        let layout = RamLayout::new([(page_size, 3 * page_size), (1 << 32, 1 << 20)]).unwrap();
        let options = GuestRamOptions::<Untracked>::default();
        let map = |region: &RamRange| Ok::<_, GuestRamError>(mapping(0, region.size as usize));
        let ram = options.map_in_pages(page_size, layout, map).unwrap();
        assert_eq!(ram.dirty_bitmap().page_size(), page_size);
        ram.write(1 << 32, b"high").unwrap();
        let marked = 3 * page_size..4 * page_size;
        assert!(ram.dirty_bitmap().runs().eq([marked]));
    }

    #[rstest]
    #[case::the_start(0x4_1000, 0x8000)]
    #[case::the_size(0x4_0000, 0x9000)]
    fn a_region_of_partial_pages_is_refused(
        #[values(4096, 16384)] page_size: u64,
        #[case] guest_start: u64,
        #[case] size: u64,
    ) {
        let layout = RamLayout::new([(0, 0x4_0000), (guest_start, size)]).unwrap();
        let options = GuestRamOptions::<Untracked>::default();
        let mut mapped = 0;
        let created = options.map_in_pages(page_size, layout.clone(), |region| {
            mapped += 1;
            Ok::<_, GuestRamError>(mapping(0, region.size as usize))
        });
        let checked = options.check_in_pages(page_size, &layout);
        if page_size == 4096 {
            checked.unwrap();
            created.unwrap();
            return;
        }
        let expected = MisalignedRegion {
            guest_start,
            size,
            page_size,
        };
        for refused in [checked.unwrap_err(), created.unwrap_err()] {
            assert!(
                matches!(refused, GuestRamError::MisalignedRegion(found) if found == expected),
                "{refused}"
            );
        }
        assert_eq!(mapped, 0);
    }

    #[rstest]
    #[case::aligned(0, 0x8000, None)]
    #[case::to_small_pages(4096, 0x8000, Some(16384))]
    #[case::not_aligned(2048, 0x8000, Some(4096))]
    #[case::one_byte_less(0, 0x7fff, Some(4096))]
    #[case::one_byte_more(0, 0x8001, Some(4096))]
    fn mappings_are_aligned_and_as_large_as_their_regions(
        #[values(4096, 16384)] page_size: u64,
        #[case] skip: usize,
        #[case] len: usize,
        #[case] refused_from: Option<u64>,
    ) {
        let layout = RamLayout::single(0, 0x8000).unwrap();
        let options = GuestRamOptions::<Untracked>::default();
        let map = |_: &RamRange| Ok::<_, GuestRamError>(mapping(skip, len));
        let created = options.map_in_pages(page_size, layout, map);
        match created {
            Ok(_) => assert!(refused_from.is_none_or(|smallest| page_size < smallest)),
            Err(GuestRamError::MisalignedAddress {
                page_size: found, ..
            }) => {
                assert_eq!(found, page_size);
                assert!(refused_from.is_some_and(|smallest| page_size >= smallest) && skip > 0);
            }
            Err(GuestRamError::MappingSize { mapped, size, .. }) => {
                assert_eq!((mapped, size), (len, 0x8000));
                assert!(refused_from.is_some() && skip == 0);
            }
            Err(other) => panic!("{other}"),
        }
    }
}
