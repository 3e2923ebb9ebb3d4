//! The options of guest RAM.

use std::sync::Arc;

use dirty_bitmap::{
    BeginEpochError, DirtyBitmap, GeometryError, Logged, LoggedEpoch, Markable, Tracked, Untracked,
};

use crate::owner::OwnerBitmap;

/// A kind of bitmap that the RAM can mark: [`Untracked`], [`Tracked`] or [`Logged`].
pub trait BitmapKind: Markable + Sized + 'static {
    /// Creates a clean bitmap of `ram_size` bytes from 0 on, in pages of `page_size` bytes.
    ///
    /// # Errors
    /// Returns the error of [`DirtyBitmap::new`].
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError>;

    /// Returns the bitmap of an owner if it is of this kind.
    fn of_owner(bitmap: OwnerBitmap) -> Option<Arc<DirtyBitmap<Self>>>;

    /// Returns a bitmap of this kind as one that an owner can mark.
    fn as_owner(bitmap: Arc<DirtyBitmap<Self>>) -> OwnerBitmap;
}

/// A kind of bitmap whose marks may be discarded after a restore: [`Untracked`] or [`Logged`].
pub trait BaselineKind: BitmapKind {
    /// Discards all marks.
    ///
    /// # Errors
    /// Returns [`BeginEpochError`] while an epoch of the bitmap is open. Nothing is discarded.
    fn discard_marks(bitmap: &Arc<DirtyBitmap<Self>>) -> Result<(), BeginEpochError>;
}

impl BitmapKind for Untracked {
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError> {
        DirtyBitmap::new(0, ram_size, page_size)
    }

    fn of_owner(bitmap: OwnerBitmap) -> Option<Arc<DirtyBitmap<Self>>> {
        match bitmap {
            OwnerBitmap::Untracked(bitmap) => Some(bitmap),
            OwnerBitmap::Tracked(_) | OwnerBitmap::Logged(_) => None,
        }
    }

    fn as_owner(bitmap: Arc<DirtyBitmap<Self>>) -> OwnerBitmap {
        OwnerBitmap::Untracked(bitmap)
    }
}

impl BitmapKind for Tracked {
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError> {
        DirtyBitmap::tracked(0, ram_size, page_size)
    }

    fn of_owner(bitmap: OwnerBitmap) -> Option<Arc<DirtyBitmap<Self>>> {
        match bitmap {
            OwnerBitmap::Tracked(bitmap) => Some(bitmap),
            OwnerBitmap::Untracked(_) | OwnerBitmap::Logged(_) => None,
        }
    }

    fn as_owner(bitmap: Arc<DirtyBitmap<Self>>) -> OwnerBitmap {
        OwnerBitmap::Tracked(bitmap)
    }
}

impl BitmapKind for Logged {
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError> {
        DirtyBitmap::logged(0, ram_size, page_size)
    }

    fn of_owner(bitmap: OwnerBitmap) -> Option<Arc<DirtyBitmap<Self>>> {
        match bitmap {
            OwnerBitmap::Logged(bitmap) => Some(bitmap),
            OwnerBitmap::Untracked(_) | OwnerBitmap::Tracked(_) => None,
        }
    }

    fn as_owner(bitmap: Arc<DirtyBitmap<Self>>) -> OwnerBitmap {
        OwnerBitmap::Logged(bitmap)
    }
}

impl BaselineKind for Untracked {
    fn discard_marks(bitmap: &Arc<DirtyBitmap<Self>>) -> Result<(), BeginEpochError> {
        let epoch = bitmap.begin_epoch()?;
        // An epoch that another thread reclaims first has put its marks back into the bitmap.
        epoch.release().map_err(|_| BeginEpochError::AlreadyOpen)
    }
}

impl BaselineKind for Logged {
    fn discard_marks(bitmap: &Arc<DirtyBitmap<Self>>) -> Result<(), BeginEpochError> {
        // No harvest: pages that are still in the log stay there, for the next diff.
        let epoch = LoggedEpoch::begin_after(Arc::clone(bitmap), |_| Ok::<_, BeginEpochError>(()))?;
        // As above.
        epoch.release().map_err(|_| BeginEpochError::AlreadyOpen)
    }
}

/// A builder for guest RAM, returned by [`GuestRam::options`](crate::GuestRam::options).
#[derive(Debug)]
#[must_use = "options do nothing until `allocate`, `map`, `own` or `adopt`"]
pub struct GuestRamOptions<K: BitmapKind = Untracked> {
    pub(crate) dirty: Option<Arc<DirtyBitmap<K>>>,
}

impl<K: BitmapKind> Default for GuestRamOptions<K> {
    fn default() -> Self {
        Self { dirty: None }
    }
}

impl<K: BitmapKind> Clone for GuestRamOptions<K> {
    fn clone(&self) -> Self {
        Self {
            dirty: self.dirty.clone(),
        }
    }
}

impl<K: BitmapKind> GuestRamOptions<K> {
    /// Marks host writes in this bitmap, instead of in a new one with pages of the host's size.
    ///
    /// The bitmap must cover the memory file: it must start at 0 and be as large as the RAM. If the
    /// layout has one region, the bitmap may also start at the region's guest-physical address.
    pub fn dirty_bitmap(mut self, dirty: Arc<DirtyBitmap<K>>) -> Self {
        self.dirty = Some(dirty);
        self
    }
}
