//! The guest's RAM in the address space of this process.

/// The RAM of one guest, with the bitmap of the pages that the host wrote, and that the guest wrote
/// under a tracker of this bitmap.
///
/// It is private anonymous memory, with a bitmap in pages of the host unless another is
/// [given](guest_ram::GuestRamOptions::dirty_bitmap). The pages of the bitmap are at least as large
/// as those of stage 2. Stage 2 only denies writes of the guest, so the host writes through
/// [`write`](guest_ram::GuestRam::write) or calls [`mark`](guest_ram::GuestRam::mark).
///
/// # Examples
/// ```
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
pub type GuestRam = guest_ram::TrackedRam;
