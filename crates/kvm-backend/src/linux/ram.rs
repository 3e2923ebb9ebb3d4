//! The RAM of a KVM guest.

mod options;

use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use guest_ram::{GuestRamError, LoggedRam, RamOwner};
use page_reader::{HostMemory, PageReader, PopulatedRanges, RamLayout, RamRange};

pub use options::GuestRamOptions;

/// The RAM of a KVM guest: a [`guest_ram::LoggedRam`], to which it dereferences, that KVM maps in
/// memory slots.
///
/// KVM's dirty log has only the guest's writes. The host writes through
/// [`write`](guest_ram::GuestRam::write) or [`write_at`](guest_ram::GuestRam::write_at), which mark
/// the pages in the [`dirty_bitmap`](guest_ram::GuestRam::dirty_bitmap). The VMM calls
/// [`mark`](guest_ram::GuestRam::mark) for a device that writes through the host address (virtio,
/// vhost).
///
/// The bitmap is a [`LoggedBitmap`](dirty_bitmap::LoggedBitmap): an epoch begins only after a
/// harvest of the log, by [`PausedHarvest::begin_epoch`](crate::PausedHarvest::begin_epoch),
/// [`DirtyLog::begin_live_epoch`](crate::DirtyLog::begin_live_epoch) or
/// [`Precopy`](crate::Precopy). Before the harvest, the pages that the guest wrote are in KVM's log
/// and not in the bitmap:
/// ```compile_fail,E0599
/// # fn example(ram: &kvm_backend::GuestRam) {
/// ram.dirty_bitmap().begin_epoch();
/// # }
/// ```
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
#[must_use = "the RAM is unmapped when this is dropped"]
pub struct GuestRam {
    ram: LoggedRam,
    memfd: Option<OwnedFd>,
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
    /// Returns [`GuestRamError`]. Nothing stays mapped.
    pub fn new(layout: RamLayout) -> Result<Self, GuestRamError> {
        Self::options().allocate(layout)
    }

    /// Uses the memory of `owner`, which holds the memory file of this layout, as
    /// [`guest_ram::GuestRam::from_owner`] does.
    ///
    /// # Errors
    /// Returns [`GuestRamError`].
    pub fn from_owner(layout: RamLayout, owner: impl RamOwner) -> Result<Self, GuestRamError> {
        Self::options().own(layout, owner)
    }

    /// Returns a builder for non-default options.
    pub fn options() -> GuestRamOptions {
        GuestRamOptions::default()
    }

    fn over(ram: LoggedRam, memfd: Option<OwnedFd>) -> Self {
        Self {
            ram,
            memfd,
            log: Mutex::default(),
        }
    }

    /// Returns the memory file behind the RAM, if [requested](GuestRamOptions::memfd). Its offsets
    /// are those of [`PageReader`].
    #[must_use]
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(AsFd::as_fd)
    }

    /// Marks all of a region of the layout.
    pub(crate) fn mark_region(&self, region: &RamRange) {
        let marked = self.mark(region.guest_start, region.size);
        assert!(marked.is_ok(), "a region of the layout is RAM");
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, LogState> {
        // Independent flags: a panic under the lock leaves none half-changed.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Converts RAM of any owner.
impl From<LoggedRam> for GuestRam {
    fn from(ram: LoggedRam) -> Self {
        Self::over(ram, None)
    }
}

impl Deref for GuestRam {
    type Target = LoggedRam;

    fn deref(&self) -> &LoggedRam {
        &self.ram
    }
}

impl PageReader for GuestRam {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.ram.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.ram.host_memory(offset, len)
    }

    fn check_source(&self) -> io::Result<()> {
        self.ram.check_source()
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.ram.populated(range)
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.ram.ram_layout()
    }
}
