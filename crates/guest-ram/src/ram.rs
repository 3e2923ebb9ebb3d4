//! The guest's RAM: its regions, and host accesses that mark.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use dirty_bitmap::{BeginEpochError, DirtyBitmap, Logged, Tracked, Untracked};
use page_reader::{HostMemory, OutsideRam, PageReader, RamLayout, RamRange};

use crate::mapping::Mapping;
use crate::options::{BaselineKind, BitmapKind, GuestRamOptions};
use crate::owner::RamOwner;

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
    /// The owner of the memory, if it is another value.
    owner: Option<Arc<dyn RamOwner>>,
}

/// Guest RAM whose marks only a [`WriteTracker`](dirty_bitmap::WriteTracker) takes.
pub type TrackedRam = GuestRam<Tracked>;

/// Guest RAM whose marks are taken only after a hypervisor's dirty log was moved into its bitmap,
/// by a [`LoggedEpoch`](dirty_bitmap::LoggedEpoch).
pub type LoggedRam = GuestRam<Logged>;

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
            owner: None,
        }
    }

    /// Sets the owner of the memory.
    pub(crate) fn owned_by(self, owner: Arc<dyn RamOwner>) -> Self {
        Self {
            owner: Some(owner),
            ..self
        }
    }

    /// Marks what was [written through the owner](RamOwner::mark_writes) of the memory. Call this
    /// after all marks were taken to make the owner's memory the baseline of the next diff.
    /// [`set_baseline`](Self::set_baseline) includes it.
    pub fn mark_owner_writes(&self) {
        if let Some(owner) = &self.owner {
            owner.mark_writes(K::as_owner(Arc::clone(&self.dirty)));
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
    ///
    /// <div class="warning">
    ///
    /// The addresses of its methods are offsets in the memory file, not guest-physical addresses.
    /// The two differ behind a gap of the layout, where `dirty_bitmap().mark(address)` marks
    /// another page without an error. To mark guest-physical addresses, call
    /// [`GuestRam::mark`](Self::mark).
    ///
    /// </div>
    #[must_use]
    pub fn dirty_bitmap(&self) -> &Arc<DirtyBitmap<K>> {
        &self.dirty
    }

    /// Returns whether host writes are marked in a place from which they must be moved to the
    /// bitmap before each save: see [`RamOwner::marks_elsewhere`].
    #[must_use]
    pub fn marks_elsewhere(&self) -> bool {
        self.owner
            .as_ref()
            .is_some_and(|owner| owner.marks_elsewhere())
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
        self.store(pieces, bytes, |piece| self.mark_piece(piece));
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks the pages dirty. This is the
    /// counterpart of [`read_at`](PageReader::read_at).
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is past the end of the RAM. Nothing is written.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes, |piece| self.mark_piece(piece));
        Ok(())
    }

    /// Writes `bytes` at `offset` of the memory file, and marks no page.
    ///
    /// This is for the restore of a snapshot before the guest runs: the bytes are those that the
    /// next diff starts from. In all other cases a page that is not marked is missing from the next
    /// diff, and nothing reports it: use [`write_at`](Self::write_at).
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is past the end of the RAM. Nothing is written.
    pub fn write_unmarked_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let pieces = self.layout.offset_pieces(offset, bytes.len() as u64)?;
        self.store(pieces, bytes, |_| ());
        Ok(())
    }

    /// Marks `len` bytes of guest-physical memory that were written through the host address. Call
    /// this after the write.
    ///
    /// # Errors
    /// Returns [`OutsideRam`] if any byte is not RAM. No page is marked.
    pub fn mark(&self, guest_start: u64, len: u64) -> Result<(), OutsideRam> {
        for piece in self.layout.guest_pieces(guest_start, len)? {
            self.mark_piece(&piece);
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

    /// Writes the pieces, and calls `written` after each of them.
    fn store(
        &self,
        pieces: impl Iterator<Item = RamRange>,
        mut bytes: &[u8],
        written: impl Fn(&RamRange),
    ) {
        for piece in pieces {
            let (now, rest) = bytes.split_at(piece.size as usize);
            self.mappings[piece.region].store(self.in_region(&piece), now);
            written(&piece);
            bytes = rest;
        }
    }

    fn mark_piece(&self, piece: &RamRange) {
        self.mark_offsets(piece.offset, piece.size);
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

impl<K: BaselineKind> GuestRam<K> {
    /// Discards all marks: the content of the RAM is the baseline of the next diff.
    ///
    /// <div class="warning">
    ///
    /// This is only for RAM that was just restored, before vCPUs and devices run. All marks are
    /// discarded, also those of writes since the restore or since the last save, and these pages
    /// are then missing from the next diff. After a save, release its epoch instead: that discards
    /// the marks of the written pages and no others.
    ///
    /// </div>
    ///
    /// The RAM must equal the snapshot that will be the parent of the next diff. Without the call
    /// the first diff after a restore is a full one, because a hypervisor's dirty log marks all of
    /// the RAM when it starts, and [`write_at`](Self::write_at) marks what it writes.
    ///
    /// Start the dirty log first: a write before its start is in no log, and its page would be
    /// missing from the next diff. In general:
    ///
    /// 1. register the RAM with the hypervisor, and start the dirty log;
    /// 2. restore the snapshot;
    /// 3. call this;
    /// 4. restore the state of the vCPUs and devices, and run them.
    ///
    /// What was [written through the owner](RamOwner::mark_writes) of the memory stays marked. The
    /// [parent](DirtyBitmap::parent) of the next diff is unknown afterwards. Pass the id of
    /// the restored snapshot to [`DirtyBitmap::set_parent_id`] to have a diff with another parent
    /// refused.
    ///
    /// The marks of a [`TrackedRam`] are taken by its tracker instead.
    ///
    /// # Errors
    /// Returns [`BeginEpochError`] while an epoch of the bitmap is open: a save is under way.
    /// Nothing is discarded.
    ///
    /// # Examples
    /// ```
    /// use guest_ram::GuestRam;
    /// use page_reader::RamLayout;
    ///
    /// let ram: GuestRam = GuestRam::new(RamLayout::single(0, 1 << 20)?)?;
    /// ram.mark_all(); // as the start of a dirty log does
    /// ram.write_unmarked_at(0x4000, b"restored")?;
    /// ram.set_baseline()?;
    /// assert!(ram.dirty_bitmap().is_clean());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_baseline(&self) -> Result<(), BeginEpochError> {
        K::discard_marks(&self.dirty)?;
        self.mark_owner_writes();
        Ok(())
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

    fn check_source(&self) -> io::Result<()> {
        match &self.owner {
            Some(owner) => owner.check_source(),
            None => Ok(()),
        }
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
