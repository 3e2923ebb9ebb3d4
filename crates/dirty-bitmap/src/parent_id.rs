//! The image that a bitmap's marks build on.

use std::sync::{Mutex, PoisonError};

use crate::bitmap::DirtyBitmap;
use crate::kind::Markable;

/// The id of an image, if it is known. No mark depends on the ordering of this value.
#[derive(Debug, Default)]
pub(crate) struct ParentId(Mutex<Option<[u8; 16]>>);

impl ParentId {
    pub(crate) fn get(&self) -> Option<[u8; 16]> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, id: Option<[u8; 16]>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }
}

impl<K> DirtyBitmap<K> {
    /// Returns the id of the image that the next diff builds on: the image that holds all pages
    /// except the marked ones. Returns `None` if it is not known.
    ///
    /// It is the [id of the epoch](crate::Epoch::set_image_id) that was released last, such as
    /// `MemoryWriter::commit_and_release` sets it, or was passed to
    /// [`set_parent_id`](Self::set_parent_id). A writer refuses a diff that names another parent.
    /// The bitmaps of an epoch have the id of the bitmap that their marks were taken out of. An
    /// epoch that is dropped or reclaimed leaves it unchanged.
    #[must_use]
    pub fn parent_id(&self) -> Option<[u8; 16]> {
        self.parent_id.get()
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Sets the id of the image that the next diff builds on, or `None` if it is not known.
    ///
    /// Call this after a restore, with the id of the newest image that was restored: a diff that
    /// names another parent is then refused. Call it also after marks of earlier epochs were added
    /// to the bitmap, with the id of the image that these marks build on.
    ///
    /// The id is unknown at first, after a [release](crate::Epoch::release) of an epoch without
    /// an id, and after marks were [drained](DirtyBitmap::drain). [`to_bytes`](Self::to_bytes) does
    /// not encode it.
    ///
    /// # Examples
    /// ```
    /// use dirty_bitmap::DirtyBitmap;
    ///
    /// let bitmap = DirtyBitmap::new(0, 1 << 20, 4096)?;
    /// bitmap.set_parent_id(Some([7; 16])); // `ImageId::to_bytes` of the restored image
    /// bitmap.mark(0x5000)?;
    /// let epoch = bitmap.begin_epoch()?;
    /// assert_eq!(epoch.bitmap().parent_id(), Some([7; 16]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn set_parent_id(&self, id: Option<[u8; 16]>) {
        self.parent_id.set(id);
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    const OLD: Option<[u8; 16]> = Some([1; 16]);
    const NEW: Option<[u8; 16]> = Some([2; 16]);

    fn bitmap() -> DirtyBitmap {
        let bitmap = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
        bitmap.set_parent_id(OLD);
        bitmap
    }

    #[test]
    fn released_epoch_sets_the_parent() {
        let bitmap = bitmap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image_id(NEW);
        assert_eq!(bitmap.parent_id(), OLD);
        epoch.release().unwrap();
        assert_eq!(bitmap.parent_id(), NEW);
        let mut epoch = bitmap.begin_epoch().unwrap();
        assert_eq!(epoch.bitmap().parent_id(), NEW);
        assert_eq!(epoch.extend().unwrap().parent_id(), NEW);
    }

    #[test]
    fn dropped_epoch_keeps_the_parent() {
        let bitmap = bitmap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image_id(NEW);
        drop(epoch);
        assert_eq!(bitmap.parent_id(), OLD);
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image_id(NEW);
        assert!(bitmap.reclaim_epoch().unwrap());
        epoch.release().unwrap_err();
        assert_eq!(bitmap.parent_id(), OLD);
    }

    #[test]
    fn marks_taken_without_an_image_forget_the_parent() {
        let bitmap = bitmap();
        bitmap.begin_epoch().unwrap().release().unwrap();
        assert_eq!(bitmap.parent_id(), None);
        bitmap.set_parent_id(OLD);
        drop(bitmap.drain().unwrap());
        assert_eq!(bitmap.parent_id(), None);
        bitmap.set_parent_id(OLD);
        bitmap.drain_into(&self::bitmap()).unwrap();
        assert_eq!(bitmap.parent_id(), None);
    }
}
