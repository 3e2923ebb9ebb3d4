//! The guest's RAM in the address space of this process.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::{GeometryError, TrackedBitmap};
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};
use thiserror::Error;

use super::sys::Mapping;
use super::vm::PAGE_SIZE;

/// The RAM of one guest, with one mapping for each region of its layout and a bitmap of the written
/// pages.
///
/// As a [`PageReader`], it provides host addresses, so that a writer needs no copy.
///
/// The host writes with [`write`](Self::write) or [`write_at`](Self::write_at), which mark the
/// pages in [`dirty_bitmap`](Self::dirty_bitmap), because stage 2 only denies writes of the guest.
/// A device that writes through the host address must call [`mark`](Self::mark).
///
/// No Rust reference to guest memory exists, and every access is atomic for each machine word.
/// vCPUs may run during an access, and any thread may read.
///
/// # Examples
/// ```no_run
/// use hvf_backend::GuestRam;
/// use page_reader::{PageReader, RamLayout};
///
/// let ram = GuestRam::new(RamLayout::single(0x8000_0000, 64 << 20)?)?;
/// ram.write(0x8000_0000, b"kernel")?;
///
/// let mut copy = [0; 6];
/// ram.read_at(0, &mut copy)?; // the same bytes, by their offset in the memory file
/// assert_eq!(&copy, b"kernel");
/// assert!(ram.dirty_bitmap().is_dirty(0)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestRam {
    layout: RamLayout,
    mappings: Box<[Mapping]>,
    dirty: Arc<TrackedBitmap>,
}

impl GuestRam {
    /// Allocates RAM of this layout, with a bitmap in pages of [16 KiB](PAGE_SIZE).
    ///
    /// The memory is anonymous and zero. The host provides pages when they are touched.
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if a region is not aligned to pages of the host, or if memory
    /// can't be allocated.
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        let dirty = TrackedBitmap::tracked(0, layout.ram_size(), PAGE_SIZE);
        Self::with_dirty_bitmap(layout, Arc::new(dirty.map_err(GuestRamError::Bitmap)?))
    }

    /// Allocates RAM of this layout, with an existing bitmap.
    ///
    /// The bitmap covers the memory file: it starts at 0 and has the size of the RAM. Its pages are
    /// at least as large as those of [stage 2](crate::Vm::granule).
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if a region is not aligned to pages of the host, if the bitmap
    /// does not cover the RAM, or if memory can't be allocated.
    pub fn with_dirty_bitmap(
        layout: RamLayout,
        dirty: Arc<TrackedBitmap>,
    ) -> Result<Self, GuestRamError> {
        check(&layout, &dirty)?;
        let map = |region: &RamRange| {
            Mapping::new(region.size as usize).map_err(|errno| GuestRamError::Allocate {
                size: region.size,
                source: errno.into(),
            })
        };
        let mappings: Result<_, GuestRamError> = layout.regions().iter().map(map).collect();
        Ok(Self {
            mappings: mappings?,
            layout,
            dirty,
        })
    }

    /// Uses memory that the caller has mapped, or allocated with `hv_vm_allocate`.
    ///
    /// `host_addresses` has one address for each region, in the order of the layout.
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if there is not one page-aligned address for each region, if a
    /// region is not aligned to pages of the host, or if the bitmap does not cover the RAM.
    ///
    /// # Safety
    /// While the [`GuestRam`] and every [`Stage2`](crate::Stage2) created from it exist:
    /// - Each range of the size of its region stays mapped, readable and writable. A file behind it
    ///   is not truncated.
    /// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
    ///   pointers, with atomic or volatile operations.
    #[allow(unsafe_code)]
    pub unsafe fn adopt(
        layout: RamLayout,
        dirty: Arc<TrackedBitmap>,
        host_addresses: &[NonNull<u8>],
    ) -> Result<Self, GuestRamError> {
        check(&layout, &dirty)?;
        if host_addresses.len() != layout.regions().len() {
            return Err(GuestRamError::AddressCount {
                given: host_addresses.len(),
                regions: layout.regions().len(),
            });
        }
        let aligned =
            |address: &&NonNull<u8>| (address.addr().get() as u64).is_multiple_of(PAGE_SIZE);
        if let Some(misaligned) = host_addresses.iter().find(|address| !aligned(address)) {
            return Err(GuestRamError::MisalignedAddress {
                address: misaligned.addr().get(),
            });
        }
        let mappings = layout
            .regions()
            .iter()
            .zip(host_addresses)
            // SAFETY: the caller upholds the contract of `Mapping::adopt`, which is the same.
            .map(|(region, address)| unsafe { Mapping::adopt(*address, region.size as usize) })
            .collect();
        Ok(Self {
            mappings,
            layout,
            dirty,
        })
    }

    /// Returns the addresses of the regions in guest-physical memory and their offsets in the
    /// memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the bitmap of the pages that the host wrote, and that the guest wrote under a
    /// tracker of this bitmap.
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<TrackedBitmap> {
        &self.dirty
    }

    /// Reads from the guest-physical address `guest_start` to fill `buf`.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. `buf` is unchanged.
    pub fn read(&self, guest_start: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, buf.len() as u64)?;
        self.load(pieces, buf);
        Ok(())
    }

    /// Writes `bytes` at the guest-physical address `guest_start`, and marks the pages.
    ///
    /// The pages are marked after the bytes are written. A concurrent save therefore either copies
    /// the new bytes or leaves the mark to the next save.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. Nothing was written.
    pub fn write(&self, guest_start: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks the pages. This is the counterpart
    /// of [`read_at`](PageReader::read_at).
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is past the end of the RAM. Nothing was written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Marks `len` bytes of guest-physical memory that were written through the host address. Call
    /// this after the write.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. No page was marked.
    pub fn mark(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            self.mark_piece(&piece);
        }
        Ok(())
    }

    /// Returns the host address of a region's first byte.
    pub(crate) fn host_address(&self, region: usize) -> *mut u8 {
        self.mappings[region].as_ptr()
    }

    fn load(&self, pieces: impl Iterator<Item = RamRange>, mut buf: &mut [u8]) {
        for piece in pieces {
            let (now, rest) = buf.split_at_mut(piece.size as usize);
            self.piece_memory(&piece).copy_to(now);
            buf = rest;
        }
    }

    fn store(&self, pieces: impl Iterator<Item = RamRange>, mut bytes: &[u8]) {
        for piece in pieces {
            let (now, rest) = bytes.split_at(piece.size as usize);
            self.mappings[piece.region].store(self.in_region(&piece), now);
            self.mark_piece(&piece);
            bytes = rest;
        }
    }

    fn mark_piece(&self, piece: &RamRange) {
        let marked = self.dirty.set_range(piece.offset, piece.size);
        assert!(
            marked.is_ok(),
            "the bitmap covers the RAM: checked at creation"
        );
    }

    fn piece_memory(&self, piece: &RamRange) -> HostMemory<'_> {
        let (at, len) = (self.in_region(piece), piece.size as usize);
        self.mappings[piece.region].host_memory(at, len)
    }

    /// Returns the start of a piece in the mapping of its region.
    fn in_region(&self, piece: &RamRange) -> usize {
        (piece.offset - self.layout.regions()[piece.region].offset) as usize
    }
}

impl PageReader for GuestRam {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let pieces = self
            .layout
            .offset_pieces(offset, buf.len() as u64)
            .map_err(|error| io::Error::new(io::ErrorKind::UnexpectedEof, error))?;
        self.load(pieces, buf);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let rest = self.layout.ram_size().checked_sub(offset)?;
        let len = rest.min(len as u64);
        let piece = self.layout.offset_pieces(offset, len).ok()?.next()?;
        Some(self.piece_memory(&piece))
    }
}

/// Checks the layout and the bitmap.
fn check(layout: &RamLayout, dirty: &TrackedBitmap) -> Result<(), GuestRamError> {
    let mut regions = layout.regions().iter();
    if let Some(region) =
        regions.find(|region| !(region.guest_start | region.size).is_multiple_of(PAGE_SIZE))
    {
        return Err(GuestRamError::MisalignedRegion {
            guest_start: region.guest_start,
            size: region.size,
        });
    }
    if (dirty.ram_start(), dirty.ram_size()) != (0, layout.ram_size()) {
        return Err(GuestRamError::BitmapMismatch {
            bitmap_start: dirty.ram_start(),
            bitmap_size: dirty.ram_size(),
            ram_size: layout.ram_size(),
        });
    }
    Ok(())
}

/// An error for guest RAM that could not be created. No memory stays mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// The start or the size of a region is not a multiple of the host's page size.
    #[error(
        "the RAM region of {size:#x} bytes at {guest_start:#x} does not consist of whole pages of \
         the host: align it to {PAGE_SIZE} bytes"
    )]
    MisalignedRegion {
        /// The guest-physical start of the region.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The bitmap does not cover the RAM.
    #[error(
        "the bitmap of {bitmap_size:#x} bytes at {bitmap_start:#x} does not match the memory file \
         of {ram_size:#x} bytes at 0: create it with `TrackedBitmap::tracked(0, layout.ram_size(), \
         page_size)`"
    )]
    BitmapMismatch {
        /// The start of the bitmap.
        bitmap_start: u64,
        /// The size of the bitmap in bytes.
        bitmap_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// The bitmap could not be created.
    #[error("failed to create the dirty bitmap")]
    Bitmap(#[source] GeometryError),
    /// The host could not allocate the memory.
    #[error(
        "failed to map {size:#x} bytes of guest RAM: check the address-space limit (ulimit -v)"
    )]
    Allocate {
        /// The size of the region in bytes.
        size: u64,
        /// The error of `mmap`.
        #[source]
        source: io::Error,
    },
    /// The number of host addresses is not the number of regions.
    #[error(
        "{given} host addresses were passed for {regions} RAM regions: pass one for each, in the \
         order of the layout"
    )]
    AddressCount {
        /// The number of addresses passed.
        given: usize,
        /// The number of regions in the layout.
        regions: usize,
    },
    /// A host address is not at a page boundary.
    #[error(
        "the host address {address:#x} is not at a page boundary: align it to {PAGE_SIZE} bytes"
    )]
    MisalignedAddress {
        /// The host address.
        address: usize,
    },
}
