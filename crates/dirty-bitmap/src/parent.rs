//! The image that a bitmap's marks build on.

use std::sync::{Mutex, PoisonError};

use crate::bitmap::DirtyBitmap;
use crate::kind::Markable;

/// The image that the marks of a bitmap build on: all pages that are not marked are in it, or in
/// the images below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(
    clippy::exhaustive_enums,
    reason = "an image is known or not, and has an id or not"
)]
pub enum ParentImage {
    /// The image is not known. A diff may name any parent.
    #[default]
    Unknown,
    /// A raw image, which has no id. A diff that names an id as its parent is refused.
    Raw,
    /// The image with this id, such as `ImageId::to_bytes` returns it.
    Id([u8; 16]),
}

impl ParentImage {
    /// Returns the id of the image, if it is known and has one.
    #[must_use]
    pub fn id(self) -> Option<[u8; 16]> {
        match self {
            Self::Unknown | Self::Raw => None,
            Self::Id(id) => Some(id),
        }
    }

    /// Returns the image with this id, or [`Raw`](Self::Raw) without one.
    #[must_use]
    pub fn of_image(id: Option<[u8; 16]>) -> Self {
        id.map_or(Self::Raw, Self::Id)
    }
}

/// The image that a bitmap's marks build on. No mark depends on the ordering of this value.
#[derive(Debug, Default)]
pub(crate) struct Parent(Mutex<ParentImage>);

impl Parent {
    pub(crate) fn get(&self) -> ParentImage {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, image: ParentImage) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = image;
    }
}

impl<K> DirtyBitmap<K> {
    /// Returns the image that the next diff builds on: the image that holds all pages except the
    /// marked ones.
    ///
    /// It is the [image of the epoch](crate::Epoch::set_image) that was released last, such as
    /// `MemoryWriter::commit_and_release` sets it, or was passed to
    /// [`set_parent`](Self::set_parent). A writer refuses a diff that names another parent. The
    /// bitmaps of an epoch have the image of the bitmap that their marks were taken out of. An
    /// epoch that is dropped or reclaimed leaves it unchanged.
    #[must_use]
    pub fn parent(&self) -> ParentImage {
        self.parent.get()
    }

    /// Returns the id of the [image that the next diff builds on](Self::parent). Returns `None` if
    /// the image is raw or not known.
    #[must_use]
    pub fn parent_id(&self) -> Option<[u8; 16]> {
        self.parent().id()
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Sets the image that the next diff builds on.
    ///
    /// Call this after a restore, with the newest image that was restored: a diff that names
    /// another parent is then refused. Call it also after marks of earlier epochs were added to the
    /// bitmap, with the image that these marks build on, and after the image that was saved last
    /// was converted to one with another id, or without one.
    ///
    /// The image is unknown at first, after a [release](crate::Epoch::release) of an epoch without
    /// an image, and after marks were [drained](DirtyBitmap::drain). [`to_bytes`](Self::to_bytes)
    /// does not encode it.
    pub fn set_parent(&self, image: ParentImage) {
        self.parent.set(image);
    }

    /// Sets the id of the [image that the next diff builds on](Self::set_parent), or `None` if the
    /// image is not known.
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
        self.set_parent(id.map_or(ParentImage::Unknown, ParentImage::Id));
    }
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    const OLD: ParentImage = ParentImage::Id([1; 16]);
    const NEW: ParentImage = ParentImage::Id([2; 16]);

    fn bitmap() -> DirtyBitmap {
        let bitmap = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
        bitmap.set_parent(OLD);
        bitmap
    }

    #[test]
    fn released_epoch_sets_the_parent() {
        let bitmap = bitmap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image(NEW);
        assert_eq!(bitmap.parent(), OLD);
        epoch.release().unwrap();
        assert_eq!(bitmap.parent(), NEW);
        let mut epoch = bitmap.begin_epoch().unwrap();
        assert_eq!(epoch.bitmap().parent(), NEW);
        assert_eq!(epoch.extend().unwrap().parent(), NEW);
    }

    #[test]
    fn raw_image_is_a_parent_without_an_id() {
        let bitmap = bitmap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image(ParentImage::of_image(None));
        epoch.release().unwrap();
        assert_eq!(bitmap.parent(), ParentImage::Raw);
        assert_eq!(bitmap.parent_id(), None);
        bitmap.set_parent_id(None);
        assert_eq!(bitmap.parent(), ParentImage::Unknown);
    }

    #[test]
    fn dropped_epoch_keeps_the_parent() {
        let bitmap = bitmap();
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image(NEW);
        drop(epoch);
        assert_eq!(bitmap.parent(), OLD);
        let mut epoch = bitmap.begin_epoch().unwrap();
        epoch.set_image(NEW);
        assert!(bitmap.reclaim_epoch().unwrap());
        epoch.release().unwrap_err();
        assert_eq!(bitmap.parent(), OLD);
    }

    #[test]
    fn marks_taken_without_an_image_forget_the_parent() {
        let bitmap = bitmap();
        bitmap.begin_epoch().unwrap().release().unwrap();
        assert_eq!(bitmap.parent(), ParentImage::Unknown);
        bitmap.set_parent(OLD);
        drop(bitmap.drain().unwrap());
        assert_eq!(bitmap.parent(), ParentImage::Unknown);
        bitmap.set_parent(OLD);
        bitmap.drain_into(&self::bitmap()).unwrap();
        assert_eq!(bitmap.parent(), ParentImage::Unknown);
    }
}
