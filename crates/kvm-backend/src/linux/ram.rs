//! The guest's RAM, mapped into this process.

mod error;
mod options;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_bitmap::DirtyBitmap;
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};

use super::sys::Mapping;

pub use error::{BitmapMismatch, GuestRamError};
pub use options::GuestRamOptions;

/// The RAM of one guest, with one mapping for each region of its layout, and the bitmap of its
/// dirty pages.
///
/// As a [`PageReader`] it provides host addresses, so that a writer needs no copy. The host writes
/// through [`write`](Self::write) or [`write_at`](Self::write_at), which mark the pages in
/// [`dirty_bitmap`](Self::dirty_bitmap): KVM's dirty log has only the guest's writes. The VMM calls
/// [`mark`](Self::mark) for a device that writes through the host address (virtio, vhost).
///
/// No Rust reference to guest memory ever exists, and every access is atomic by machine word: vCPUs
/// may run meanwhile.
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
/// ram.read_at(1 << 20, &mut copy)?; // the same bytes, by their offset in the memory file
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

/// The state of KVM's slots and log of this RAM. It is here because several
/// [`RamSlots`](crate::RamSlots) may name the same slots.
#[derive(Debug, Default)]
pub(crate) struct LogState {
    /// A [`DirtyLog`](crate::DirtyLog) exists.
    pub(crate) claimed: bool,
    /// The log has been on since all of the RAM was marked.
    pub(crate) on: bool,
    /// A [`RamSlots`](crate::RamSlots) has registered the RAM.
    pub(crate) registered: bool,
}

impl GuestRam {
    /// Allocates RAM of this layout: shared anonymous memory, zeroed. The host allocates a page
    /// when it is first touched.
    ///
    /// # Errors
    /// [`GuestRamError`].
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        Self::options().allocate(layout)
    }

    /// Returns a builder for non-default options.
    pub fn options() -> GuestRamOptions {
        GuestRamOptions::default()
    }

    /// Returns the layout: the place of each region in guest-physical memory and in the memory
    /// file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the bitmap of the pages written by the host and, after a
    /// [harvest](crate::DirtyLog::harvest), by the guest.
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.dirty
    }

    /// Returns the memory file behind the RAM, if [requested](GuestRamOptions::memfd). Its offsets
    /// are those of [`PageReader`].
    #[must_use]
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Reads the bytes at the guest-physical address `guest_start` into `buf`.
    ///
    /// # Errors
    /// [`OutsideRam`] if any byte is not RAM. `buf` is unchanged.
    pub fn read(&self, guest_start: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, buf.len() as u64)?;
        self.load(pieces, buf);
        Ok(())
    }

    /// Writes `bytes` at the guest-physical address `guest_start`, and marks the pages dirty.
    ///
    /// The mark is set after the bytes are written. A save that runs meanwhile copies the new
    /// bytes, or finds the mark the next time.
    ///
    /// # Errors
    /// [`OutsideRam`] if any byte is not RAM. Nothing is written.
    pub fn write(&self, guest_start: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks the pages dirty. The counterpart of
    /// [`read_at`](PageReader::read_at).
    ///
    /// # Errors
    /// [`OutsideRam`] if any byte is past the RAM. Nothing is written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Marks `len` bytes of guest-physical memory that a device wrote through the host address.
    /// Call it after the write.
    ///
    /// # Errors
    /// [`OutsideRam`] if any byte is not RAM. Nothing is marked.
    pub fn mark(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            self.mark_piece(&piece);
        }
        Ok(())
    }

    /// Marks all of the RAM.
    pub(crate) fn mark_all(&self) {
        self.mark_offsets(0, self.layout.ram_size());
    }

    /// Marks all of a region.
    pub(crate) fn mark_all_of(&self, region: &RamRange) {
        self.mark_piece(region);
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, LogState> {
        // Independent flags: a panic under the lock leaves none half-changed.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.mark_offsets(piece.offset, piece.size);
    }

    fn mark_offsets(&self, offset: u64, size: u64) {
        let marked = self.dirty.set_range(self.dirty.ram_start() + offset, size);
        assert!(
            marked.is_ok(),
            "the bitmap covers the RAM: checked when the RAM was created"
        );
    }

    fn piece_memory(&self, piece: &RamRange) -> HostMemory<'_> {
        self.mappings[piece.region].host_memory(self.in_region(piece), piece.size as usize)
    }

    /// Returns the offset of a piece in the mapping of its region.
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
