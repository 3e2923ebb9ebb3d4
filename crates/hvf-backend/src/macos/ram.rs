//! The guest's RAM as this process has it mapped.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::{GeometryError, TrackedBitmap};
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};
use thiserror::Error;

use super::sys::Mapping;
use super::vm::PAGE_SIZE;

/// The RAM of one guest, in one mapping for each region of its layout, with the bitmap of what was written to it.
///
/// As a [`PageReader`] it hands out host addresses, so that a writer needs no copy. The host writes by [`write`](Self::write) or
/// [`write_at`](Self::write_at), which mark the pages in [`dirty_bitmap`](Self::dirty_bitmap): stage 2 stops the guest's writes only. A
/// device that writes through the host address itself must mark too: [`mark`](Self::mark).
///
/// No reference to guest memory ever exists, and every access is atomic by machine word: vCPUs may run meanwhile, and any thread may
/// read.
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
    /// Allocates RAM of this layout: anonymous memory, zero, of which the host gives what is touched. Its writes are marked in pages of
    /// [16 KiB](PAGE_SIZE).
    ///
    /// # Errors
    /// [`GuestRamError`].
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        let dirty = TrackedBitmap::tracked(0, layout.ram_size(), PAGE_SIZE);
        Self::with_dirty_bitmap(layout, Arc::new(dirty.map_err(GuestRamError::Bitmap)?))
    }

    /// The same with writes marked in this bitmap, which covers the memory file: it starts at 0 and is as large as the RAM. Its pages are
    /// at least those of [stage 2](crate::Vm::granule).
    ///
    /// # Errors
    /// [`GuestRamError`].
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

    /// Takes memory that the caller has mapped, or had from `hv_vm_allocate`: a host address for each region, in the layout's order.
    ///
    /// # Errors
    /// [`GuestRamError`]: not one page-aligned address for each region, or as [`with_dirty_bitmap`](Self::with_dirty_bitmap).
    ///
    /// # Safety
    /// As long as the [`GuestRam`] lives, and with it every [`Stage2`](crate::Stage2) made from it:
    /// - each range, from its address and as long as its region, stays mapped, readable and writable; a file behind it isn't truncated;
    /// - no Rust reference covers any of it, and Rust code of this process accesses it through raw pointers by atomic or
    ///   volatile operations only.
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
            // SAFETY: what `Mapping::adopt` asks is what this function asks of its caller.
            .map(|(region, address)| unsafe { Mapping::adopt(*address, region.size as usize) })
            .collect();
        Ok(Self {
            mappings,
            layout,
            dirty,
        })
    }

    /// Where the regions lie in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The pages written by the host, and those that a tracker of this bitmap saw the guest write.
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<TrackedBitmap> {
        &self.dirty
    }

    /// Fills `buf` from the guest-physical address `guest_start` on.
    ///
    /// # Errors
    /// [`OutsideRam`] where any byte is not RAM; `buf` is as it was.
    pub fn read(&self, guest_start: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, buf.len() as u64)?;
        self.load(pieces, buf);
        Ok(())
    }

    /// Writes `bytes` at the guest-physical address `guest_start`, and marks the pages dirty.
    ///
    /// The mark is set after the bytes are there, so a save that runs meanwhile either copies the new bytes or finds
    /// the mark the next time.
    ///
    /// # Errors
    /// [`OutsideRam`] where any byte is not RAM: nothing is written.
    pub fn write(&self, guest_start: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks the pages dirty: what [`read_at`](PageReader::read_at) is for reading.
    ///
    /// # Errors
    /// [`OutsideRam`] where any byte is past the RAM: nothing is written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Marks what something else wrote to `len` bytes of guest-physical memory through the host address. To be called after the write.
    ///
    /// # Errors
    /// [`OutsideRam`] where any byte is not RAM: nothing is marked.
    pub fn mark(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            self.mark_piece(&piece);
        }
        Ok(())
    }

    /// The host address of a region's first byte.
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
            "the bitmap covers the RAM: checked when made"
        );
    }

    fn piece_memory(&self, piece: &RamRange) -> HostMemory<'_> {
        let (at, len) = (self.in_region(piece), piece.size as usize);
        self.mappings[piece.region].host_memory(at, len)
    }

    /// Where a piece starts in its region's mapping.
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

/// Everything about the layout and the bitmap that doesn't need memory.
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

/// Guest RAM can't be made. Nothing stays mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// A region's start or size is no multiple of the host's page size.
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes does not start and end at a multiple of {PAGE_SIZE} bytes: \
         the framework maps whole pages of the host"
    )]
    MisalignedRegion {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The bitmap given does not cover the RAM.
    #[error(
        "the bitmap covers {bitmap_size:#x} bytes from {bitmap_start:#x} on, the guest has {ram_size:#x} bytes of RAM: \
         make it with `TrackedBitmap::tracked(0, layout.ram_size(), page_size)`"
    )]
    BitmapMismatch {
        /// Where the bitmap starts.
        bitmap_start: u64,
        /// The bytes it covers.
        bitmap_size: u64,
        /// The bytes of the guest's RAM.
        ram_size: u64,
    },
    /// A bitmap can't be made.
    #[error("no dirty bitmap for this RAM")]
    Bitmap(#[source] GeometryError),
    /// The host gives no memory.
    #[error(
        "mmap of {size:#x} bytes of guest RAM failed: check the address-space limit (ulimit -v)"
    )]
    Allocate {
        /// The size of the region in bytes.
        size: u64,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Not one host address for each region.
    #[error(
        "{given} host addresses for {regions} RAM regions: give one for each, in the layout's order"
    )]
    AddressCount {
        /// The addresses given.
        given: usize,
        /// The regions of the layout.
        regions: usize,
    },
    /// A host address is not the start of a page.
    #[error(
        "the host address {address:#x} is no multiple of {PAGE_SIZE} bytes: the framework maps whole pages of the host"
    )]
    MisalignedAddress {
        /// The host address.
        address: usize,
    },
}
