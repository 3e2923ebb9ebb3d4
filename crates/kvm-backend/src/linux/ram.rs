//! The guest's RAM as this process has it mapped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_bitmap::{DirtyBitmap, GeometryError};
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};
use thiserror::Error;

use super::sys::{self, Mapping};

/// The RAM of one guest, in one mapping for each region of its layout, with the bitmap of what was written to it.
///
/// As a [`PageReader`] it hands out host addresses, so that a writer needs no copy. The host writes by [`write`](Self::write) or
/// [`write_at`](Self::write_at), which mark the pages in [`dirty_bitmap`](Self::dirty_bitmap): KVM's dirty log knows of the
/// guest's writes only. A device that writes through the host address itself (virtio, vhost) must mark too: [`mark`](Self::mark).
///
/// No reference to guest memory ever exists, and every access is atomic by machine word: vCPUs may run meanwhile.
///
/// # Examples
/// ```
/// use kvm_backend::GuestRam;
/// use page_reader::{PageReader, RamLayout};
///
/// // 1 MiB at 0, and 1 MiB above the MMIO gap.
/// let ram = GuestRam::new(RamLayout::new([(0, 1 << 20), (1 << 32, 1 << 20)])?)?;
/// ram.write(1 << 32, b"kernel")?;
///
/// let mut copy = [0; 6];
/// ram.read_at(1 << 20, &mut copy)?; // the same byte, as an offset in the memory file
/// assert_eq!(&copy, b"kernel");
/// assert!(ram.dirty_bitmap().is_dirty(1 << 20)?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestRam {
    layout: RamLayout,
    mappings: Box<[Mapping]>,
    memfd: Option<OwnedFd>,
    dirty: Arc<DirtyBitmap>,
    log: Mutex<LogState>,
}

/// KVM's slots and log of this RAM: here, because values may share its slots.
#[derive(Debug, Default)]
pub(crate) struct LogState {
    /// A [`DirtyLog`](crate::DirtyLog) lives.
    pub(crate) claimed: bool,
    /// It has been on since all of the RAM was marked.
    pub(crate) on: bool,
    /// A [`RamSlots`](crate::RamSlots) has registered it.
    pub(crate) registered: bool,
}

/// How guest RAM is made: [`GuestRam::options`].
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `allocate` or `adopt`"]
pub struct GuestRamOptions {
    memfd: Option<String>,
    huge_pages: bool,
    dirty: Option<Arc<DirtyBitmap>>,
}

impl GuestRam {
    /// Allocates RAM of this layout: shared anonymous memory, zero, of which the host gives what is touched.
    ///
    /// # Errors
    /// [`GuestRamError`].
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        Self::options().allocate(layout)
    }

    /// Says how RAM is to be made.
    pub fn options() -> GuestRamOptions {
        GuestRamOptions::default()
    }

    /// Where the regions lie in guest-physical memory and in the memory file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The pages written by the host, and, once [harvested](crate::DirtyLog::harvest), by the guest.
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.dirty
    }

    /// The memory file behind the RAM, if it was [asked for](GuestRamOptions::memfd); its offsets are those of [`PageReader`].
    #[must_use]
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
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

    /// Marks all of it.
    pub(crate) fn mark_all(&self) {
        self.mark_offsets(0, self.layout.ram_size());
    }

    /// Marks all of a region.
    pub(crate) fn mark_all_of(&self, region: &RamRange) {
        self.mark_piece(region);
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, LogState> {
        // Two flags, which a panic leaves whole.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.mark_offsets(piece.offset, piece.size);
    }

    fn mark_offsets(&self, offset: u64, size: u64) {
        let marked = self.dirty.set_range(self.dirty.ram_start() + offset, size);
        assert!(
            marked.is_ok(),
            "the bitmap covers the RAM: checked when it was taken"
        );
    }

    fn piece_memory(&self, piece: &RamRange) -> HostMemory<'_> {
        self.mappings[piece.region].host_memory(self.in_region(piece), piece.size as usize)
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

impl GuestRamOptions {
    /// Backs the RAM by one memory file of this name (shown in `/proc/self/maps`), for other processes to map: vhost-user
    /// devices, a page server. It is sealed: its size stays. It also lets a process without privileges find out which pages nobody
    /// ever touched ([`populated`](PageReader::populated)), which of other shared memory takes `CAP_CHECKPOINT_RESTORE`.
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

    /// Asks the host for huge pages (`MADV_HUGEPAGE`), which it gives as `/sys/kernel/mm/transparent_hugepage/shmem_enabled`
    /// says. The dirty log still counts small pages.
    pub fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Has host writes marked in this bitmap, in place of a new one in pages of the host's size.
    ///
    /// It must cover the memory file: start at 0 and be as large as the RAM. Where the layout is one region it may
    /// also start at the region's guest-physical address.
    pub fn dirty_bitmap(mut self, dirty: Arc<DirtyBitmap>) -> Self {
        self.dirty = Some(dirty);
        self
    }

    /// Allocates the RAM.
    ///
    /// # Errors
    /// [`GuestRamError`]; what was mapped is unmapped again.
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

    /// Takes memory that the caller has mapped: a host address for each region, in the layout's order. Only the bitmap of these options counts.
    ///
    /// # Errors
    /// [`GuestRamError`]: not one page-aligned address for each region.
    ///
    /// # Safety
    /// As long as the [`GuestRam`] lives, and with it every [`RamSlots`](crate::RamSlots) made from it:
    /// - each range, from its address and as long as its region, stays mapped, readable and writable; a file behind it isn't truncated;
    /// - no Rust reference covers any of it, and Rust code of this process accesses it through raw pointers by atomic or
    ///   volatile operations only.
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
            // SAFETY: what `Mapping::adopt` asks is what this function asks of its caller.
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

    /// The bitmap to use, after everything about the layout was checked that doesn't need memory.
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

/// Whether `bitmap` covers the memory file, from its own start on.
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

/// A bitmap that does not cover this guest's RAM.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the bitmap covers {bitmap_size:#x} bytes from {bitmap_start:#x} on, the guest has {ram_size:#x} bytes of RAM: \
     make it with `DirtyBitmap::new(0, layout.ram_size(), page_size)`"
)]
#[non_exhaustive]
pub struct BitmapMismatch {
    /// Where the bitmap starts.
    pub bitmap_start: u64,
    /// The bytes it covers.
    pub bitmap_size: u64,
    /// The bytes of the guest's RAM.
    pub ram_size: u64,
}

/// Guest RAM can't be made. Nothing stays mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GuestRamError {
    /// A region's start or size is no multiple of the host's page size.
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes does not start and end at a multiple of the host's page of \
         {page_size} bytes: KVM takes whole pages only"
    )]
    MisalignedRegion {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The host's page size in bytes.
        page_size: u64,
    },
    /// The bitmap given does not cover the RAM.
    #[error(transparent)]
    BitmapMismatch(#[from] BitmapMismatch),
    /// A bitmap can't be made.
    #[error("no dirty bitmap for this RAM")]
    Bitmap(#[source] GeometryError),
    /// The host gives no memory.
    #[error(
        "{call} of {size:#x} bytes of guest RAM failed: check the address-space limit (ulimit -v), the overcommit policy, and, \
         for a memory file, the file-size limit (ulimit -f)"
    )]
    Allocate {
        /// The system call.
        call: &'static str,
        /// The size of the RAM in bytes.
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
        "the host address {address:#x} is no multiple of the page of {page_size} bytes: KVM maps whole pages"
    )]
    MisalignedAddress {
        /// The host address.
        address: usize,
        /// The host's page size in bytes.
        page_size: u64,
    },
}
