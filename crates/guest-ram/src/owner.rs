//! A value that owns the memory of a guest, and lends it to its RAM.

#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, LoggedBitmap, Markable, ParentImage, TrackedBitmap};
use page_reader::PageReader;

use crate::errors::GuestRamError;

/// The bitmap in which the owner of a guest's memory marks what is written through the owner.
#[derive(Clone, Debug)]
#[allow(
    clippy::exhaustive_enums,
    reason = "one variant for each kind of bitmap that is marked"
)]
pub enum OwnerBitmap {
    /// A bitmap whose marks any owner may take.
    Untracked(Arc<DirtyBitmap>),
    /// A bitmap whose marks a write tracker takes.
    Tracked(Arc<TrackedBitmap>),
    /// A bitmap into which a dirty log is moved.
    Logged(Arc<LoggedBitmap>),
}

impl OwnerBitmap {
    /// Marks the bytes of `range`: offsets in the memory file. Bytes past the end of the RAM are
    /// ignored.
    pub fn mark_offsets(&self, range: Range<u64>) {
        match self {
            Self::Untracked(bitmap) => mark_offsets(bitmap, range),
            Self::Tracked(bitmap) => mark_offsets(bitmap, range),
            Self::Logged(bitmap) => mark_offsets(bitmap, range),
        }
    }

    /// Returns whether both are the same bitmap.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Untracked(one), Self::Untracked(other)) => Arc::ptr_eq(one, other),
            (Self::Tracked(one), Self::Tracked(other)) => Arc::ptr_eq(one, other),
            (Self::Logged(one), Self::Logged(other)) => Arc::ptr_eq(one, other),
            (Self::Untracked(_) | Self::Tracked(_) | Self::Logged(_), _) => false,
        }
    }
}

fn mark_offsets<K: Markable>(bitmap: &DirtyBitmap<K>, range: Range<u64>) {
    let end = range.end.min(bitmap.ram_size());
    if let Some(len) = end.checked_sub(range.start).filter(|len| *len > 0) {
        let marked = bitmap.mark_range(bitmap.ram_start() + range.start, len);
        debug_assert!(marked.is_ok(), "the range is inside the RAM");
    }
}

/// A value that owns the mapped memory of a guest, and lends it to a
/// [`GuestRam`](crate::GuestRam).
///
/// Implemented by `MappedChain` and `MappedImage` of the crate `memory-image`, by `LazyRam` of the
/// crate `lazy-restore`, and, with the feature `vm-memory`, by `GuestMemoryReader` of an
/// `Arc<GuestMemoryMmap>`. It is implemented for `Arc<O>` too, by which a VMM keeps access to the
/// owner, such as to wait for a `LazyRam`.
///
/// [`check_source`](PageReader::check_source) of the RAM is that of the owner.
///
/// # Safety
/// For every range whose bytes [`host_memory`](PageReader::host_memory) returns:
/// - The memory stays mapped, readable and writable at the same address until the value is dropped,
///   also after the value was moved. A file behind it is not truncated. Memory that is filled on
///   first touch counts as readable and writable.
/// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
///   pointers, with atomic or volatile operations.
///
/// # Examples
/// ```
/// use std::io;
/// use guest_ram::{GuestRam, Mapping, RamOwner};
/// use page_reader::{HostMemory, PageReader, RamLayout};
///
/// #[derive(Debug)]
/// struct Pool(Mapping); // the memory of a VMM
///
/// impl PageReader for Pool {
///     fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
///         self.0.host_memory(offset as usize, buf.len()).copy_to(buf);
///         Ok(())
///     }
///
///     fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
///         let len = len.min(self.0.len().checked_sub(offset as usize)?);
///         (len > 0).then(|| self.0.host_memory(offset as usize, len))
///     }
/// }
///
/// // SAFETY: the memory is that of a `Mapping`, which makes these promises.
/// unsafe impl RamOwner for Pool {}
///
/// let pool = Pool(Mapping::anonymous(1 << 20)?);
/// let ram: GuestRam = GuestRam::from_owner(RamLayout::single(0, 1 << 20)?, pool)?;
/// ram.write(0x1000, b"kernel")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not own the memory of a guest's RAM",
    label = "this type does not implement `RamOwner`",
    note = "for guest memory of the crate `vm-memory`, call `GuestRam::from_guest_memory` (feature \
            `vm-memory` of `guest-ram`)",
    note = "for a value that is used elsewhere too, pass an `Arc` of it"
)]
pub unsafe trait RamOwner: PageReader + fmt::Debug + Send + Sync + 'static {
    /// Returns the bitmap in which the owner marks what is written through it, if it has one. The
    /// RAM then has this bitmap too.
    ///
    /// # Errors
    /// Returns [`GuestRamError`] if the marks of the owner are not those of its memory.
    fn own_bitmap(&self) -> Result<Option<OwnerBitmap>, GuestRamError> {
        Ok(None)
    }

    /// Returns the image whose state the memory had when the owner was created. It becomes the
    /// [parent](DirtyBitmap::parent) of the next diff, unless it is
    /// [unknown](ParentImage::Unknown).
    ///
    /// An owner that offers writes without [`own_bitmap`](Self::own_bitmap) implements
    /// [`mark_writes`](Self::mark_writes) too. Otherwise the pages that were written before the
    /// RAM took the memory are missing from the next diff.
    fn image(&self) -> ParentImage {
        ParentImage::Unknown
    }

    /// Marks in `bitmap` what was written through the owner since the memory had the state of
    /// [`image`](Self::image), and keeps `bitmap` to mark later writes in it. Each mark follows its
    /// write.
    ///
    /// `bitmap` is that of a RAM that takes the memory. The RAM calls this again after its marks
    /// were [discarded](crate::GuestRam::set_baseline). The default does nothing, for an owner that
    /// offers no writes, or that marks them in a bitmap of its own.
    fn mark_writes(&self, bitmap: OwnerBitmap) {
        let _ = bitmap;
    }

    /// Returns whether writes through the owner are marked in a place from which the VMM moves
    /// them to the bitmap of the RAM before each save: an `AtomicBitmap` of `vm-memory`.
    fn marks_elsewhere(&self) -> bool {
        false
    }
}

// SAFETY: the memory is that of the owner in it, which the `Arc` does not move.
unsafe impl<O: RamOwner + ?Sized> RamOwner for Arc<O> {
    fn own_bitmap(&self) -> Result<Option<OwnerBitmap>, GuestRamError> {
        (**self).own_bitmap()
    }

    fn image(&self) -> ParentImage {
        (**self).image()
    }

    fn mark_writes(&self, bitmap: OwnerBitmap) {
        (**self).mark_writes(bitmap);
    }

    fn marks_elsewhere(&self) -> bool {
        (**self).marks_elsewhere()
    }
}

#[cfg(feature = "vm-memory")]
mod guest_memory {
    use std::any::TypeId;
    use std::fmt;
    use std::sync::Arc;

    use dirty_bitmap::{DirtyBitmapSlice, Logged, Tracked, Untracked};
    use page_reader::GuestMemoryReader;
    use vm_memory::GuestMemoryMmap;
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};

    use super::{OwnerBitmap, RamOwner};
    use crate::errors::GuestRamError;

    // SAFETY: the memory is mapped readable and writable until the last `Arc` of it is dropped, and
    // `vm-memory` accesses it by volatile operations. The reader returns no address of memory that
    // is mapped for a single access. That a file is not truncated is a condition of `vm-memory`
    // too.
    unsafe impl<B: Bitmap + fmt::Debug + Send + Sync + 'static> RamOwner
        for GuestMemoryReader<Arc<GuestMemoryMmap<B>>>
    {
        fn own_bitmap(&self) -> Result<Option<OwnerBitmap>, GuestRamError> {
            let memory = &**self.memory();
            if let Some(bitmap) = DirtyBitmapSlice::<Untracked>::bitmap_of(memory)? {
                return Ok(Some(OwnerBitmap::Untracked(bitmap)));
            }
            if let Some(bitmap) = DirtyBitmapSlice::<Tracked>::bitmap_of(memory)? {
                return Ok(Some(OwnerBitmap::Tracked(bitmap)));
            }
            let logged = DirtyBitmapSlice::<Logged>::bitmap_of(memory)?;
            Ok(logged.map(OwnerBitmap::Logged))
        }

        fn marks_elsewhere(&self) -> bool {
            let of_region = TypeId::of::<B>();
            [
                TypeId::of::<AtomicBitmap>(),
                TypeId::of::<Option<AtomicBitmap>>(),
            ]
            .contains(&of_region)
        }
    }
}
