//! The guest's RAM: its regions, and host accesses that mark.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, Tracked, Untracked};
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};

use crate::mapping::Mapping;
use crate::options::{BitmapKind, GuestRamOptions};

/// The RAM of one guest, with one mapping for each region of its layout, and the bitmap of its
/// dirty pages.
///
/// The host writes with [`write`](Self::write) or [`write_at`](Self::write_at), which mark the
/// pages in [`dirty_bitmap`](Self::dirty_bitmap): a hypervisor reports the guest's writes only. A
/// device that writes through the host address (virtio, vhost) must call [`mark`](Self::mark).
///
/// As a [`PageReader`] it provides host addresses, so that a writer needs no copy.
///
/// No Rust reference to guest memory exists, and every access is atomic for each machine word.
/// vCPUs may run during an access, and any thread may read or write.
///
/// # Examples
/// ```
/// use guest_ram::GuestRam;
/// use page_reader::{PageReader, RamLayout};
///
/// let ram: GuestRam = GuestRam::new(RamLayout::single(0x8000_0000, 1 << 20)?)?;
/// ram.write(0x8000_4000, b"kernel")?;
/// let epoch = ram.dirty_bitmap().begin_epoch()?;
/// for run in epoch.bitmap().runs() {
///     let mut pages = vec![0; (run.end - run.start) as usize];
///     ram.read_at(run.start, &mut pages)?; // and write them to a file
/// }
/// epoch.release()?; // after the file is durable
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GuestRam<K: BitmapKind = Untracked> {
    layout: RamLayout,
    /// One for each region, of its size.
    mappings: Box<[Mapping]>,
    dirty: Arc<DirtyBitmap<K>>,
}

/// Guest RAM whose marks only a [`WriteTracker`](dirty_bitmap::WriteTracker) takes.
pub type TrackedRam = GuestRam<Tracked>;

impl<K: BitmapKind> GuestRam<K> {
    /// Returns a builder for non-default options.
    pub fn options() -> GuestRamOptions<K> {
        GuestRamOptions::default()
    }

    /// Creates RAM of what the options have checked.
    pub(crate) fn new_checked(
        layout: RamLayout,
        mappings: Box<[Mapping]>,
        dirty: Arc<DirtyBitmap<K>>,
    ) -> Self {
        Self {
            layout,
            mappings,
            dirty,
        }
    }

    /// Returns the layout: the place of each region in guest-physical memory and in the memory
    /// file.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Returns the bitmap of the pages that the host wrote, and that were marked for the guest: by
    /// a dirty log or by a write tracker.
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<DirtyBitmap<K>> {
        &self.dirty
    }

    /// Returns the host address of a region's first byte, for registration with a hypervisor.
    ///
    /// The memory is readable, writable and as large as the region while `self` exists. Rust code
    /// must access it only with atomic or volatile operations, and [mark](Self::mark) its writes.
    ///
    /// # Panics
    /// Panics if the layout has no region of this number.
    #[must_use]
    pub fn host_address(&self, region: usize) -> NonNull<u8> {
        self.mappings[region].start()
    }

    /// Reads the bytes at the guest-physical address `guest_start` into `buf`.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. `buf` is unchanged.
    pub fn read(&self, guest_start: u64, buf: &mut [u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, buf.len() as u64)?;
        self.load(pieces, buf);
        Ok(())
    }

    /// Writes `bytes` at the guest-physical address `guest_start`, and marks the pages dirty.
    ///
    /// The pages are marked after the bytes are written. A concurrent save copies the new bytes, or
    /// leaves the mark to the next save.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. Nothing is written.
    pub fn write(&self, guest_start: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.guest_pieces(guest_start, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks the pages dirty. This is the
    /// counterpart of [`read_at`](PageReader::read_at).
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is past the end of the RAM. Nothing is written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes);
        Ok(())
    }

    /// Marks `len` bytes of guest-physical memory that were written through the host address. Call
    /// this after the write.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. No page is marked.
    pub fn mark(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            self.mark_offsets(piece.offset, piece.size);
        }
        Ok(())
    }

    /// Marks all of the RAM. Call this where writes may have been missed, such as after a dirty log
    /// was switched off.
    pub fn mark_all(&self) {
        self.mark_offsets(0, self.layout.ram_size());
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
            self.mark_offsets(piece.offset, piece.size);
            bytes = rest;
        }
    }

    fn mark_offsets(&self, offset: u64, size: u64) {
        let marked = self.dirty.mark_range(self.dirty.ram_start() + offset, size);
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

impl<K: BitmapKind> PageReader for GuestRam<K> {
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

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(&self.layout)
    }
}

impl<K: BitmapKind> fmt::Debug for GuestRam<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("layout", &self.layout)
            .field("mappings", &self.mappings)
            .field("dirty", &self.dirty)
            .finish()
    }
}
