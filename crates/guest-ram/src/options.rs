//! The options of guest RAM.

use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, GeometryError, Markable, Tracked, Untracked};

/// A kind of bitmap that the RAM can mark: [`Untracked`] or [`Tracked`].
pub trait BitmapKind: Markable + Sized + 'static {
    /// Creates a clean bitmap of `ram_size` bytes from 0 on, in pages of `page_size` bytes.
    ///
    /// # Errors
    /// Returns the error of [`DirtyBitmap::new`].
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError>;
}

impl BitmapKind for Untracked {
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError> {
        DirtyBitmap::new(0, ram_size, page_size)
    }
}

impl BitmapKind for Tracked {
    fn new_bitmap(ram_size: u64, page_size: u64) -> Result<DirtyBitmap<Self>, GeometryError> {
        DirtyBitmap::tracked(0, ram_size, page_size)
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
