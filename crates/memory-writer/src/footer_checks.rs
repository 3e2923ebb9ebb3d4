//! Checks that the pages of a write belong in an image with this footer.

use std::path::Path;

use dirty_bitmap::{DirtyBitmap, ParentImage, coalesce};
use image_format::ImageId;
use page_reader::{PageReader, RamLayout};

use crate::error::SnapshotError;
use crate::seal::{Parent, regions_of};
use crate::sealing::{FooterBuilder, Regions};

impl FooterBuilder {
    /// Checks that the image at `dest` may be full.
    pub(crate) fn check_full(&self, dest: &Path) -> Result<(), SnapshotError> {
        match self.parent() {
            Parent::Image(_) => Err(SnapshotError::FullWithParent { dest: dest.into() }),
            Parent::Unnamed | Parent::Raw => Ok(()),
        }
    }

    /// Checks that a chain accepts the image at `dest` if it is a diff.
    pub(crate) fn check_parent(&self, dest: &Path) -> Result<(), SnapshotError> {
        match self.parent() {
            Parent::Unnamed if !self.is_full() => {
                Err(SnapshotError::DiffWithoutParent { dest: dest.into() })
            }
            Parent::Unnamed | Parent::Raw | Parent::Image(_) => Ok(()),
        }
    }

    /// Checks that the marks of a bitmap build on the parent of the image at `dest`, as far as both
    /// are known.
    pub(crate) fn check_marks<K>(
        &self,
        dirty: &DirtyBitmap<K>,
        dest: &Path,
    ) -> Result<(), SnapshotError> {
        let dest = || dest.to_owned();
        match (self.parent(), dirty.parent()) {
            (Parent::Image(parent), ParentImage::Id(newest)) if parent.to_bytes() != newest => {
                Err(SnapshotError::StaleParent {
                    dest: dest(),
                    parent,
                    newest: ImageId::from_bytes(newest),
                })
            }
            (Parent::Image(parent), ParentImage::Raw) => Err(SnapshotError::ParentNotRaw {
                dest: dest(),
                parent,
            }),
            (Parent::Raw, ParentImage::Id(newest)) => Err(SnapshotError::RawParent {
                dest: dest(),
                newest: ImageId::from_bytes(newest),
            }),
            (Parent::Unnamed, _)
            | (Parent::Raw, ParentImage::Unknown | ParentImage::Raw)
            | (Parent::Image(_), ParentImage::Unknown | ParentImage::Id(_)) => Ok(()),
        }
    }

    /// Checks that a reader's layout is that of the footer, as far as both are known.
    pub(crate) fn check_reader<R: PageReader + ?Sized>(
        &self,
        reader: &R,
        dest: &Path,
    ) -> Result<(), SnapshotError> {
        match reader.ram_layout() {
            Some(layout) if !self.has_layout(layout) => Err(SnapshotError::Regions {
                dest: dest.into(),
                snapshot: self.footer.regions.clone(),
                reader: regions_of(layout),
            }),
            Some(_) | None => Ok(()),
        }
    }

    fn has_layout(&self, layout: &RamLayout) -> bool {
        let known = &self.footer.regions;
        let is_same = match self.regions {
            Regions::Default => true,
            Regions::Start => layout.regions()[0].guest_start == known[0].start,
            // Adjacent regions are the same RAM as one.
            Regions::Known => coalesce(known.iter().cloned()).eq(layout.addresses()),
        };
        is_same && layout.ram_size() == self.footer.ram_size
    }

    /// Sets the regions to those of a reader that was [checked](Self::check_reader), unless they
    /// are known.
    pub(crate) fn set_regions_of<R: PageReader + ?Sized>(&mut self, reader: &R) {
        if let Some(layout) = reader.ram_layout()
            && self.regions != Regions::Known
        {
            self.footer.regions = regions_of(layout);
            self.regions = Regions::Known;
        }
    }
}
