//! Checks that the pages of a write belong in an image with this footer.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use dirty_bitmap::{DirtyBitmap, coalesce};
use image_format::{Footer, ImageId};
use nix::fcntl::OFlag;
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

    /// Checks that the image at `dest`, which the new one replaces, is not its parent. A file that
    /// cannot be read as an image is not.
    pub(crate) fn check_keeps_parent(&self, dest: &Path) -> Result<(), SnapshotError> {
        let Parent::Image(parent) = self.parent() else {
            return Ok(());
        };
        let is_file = dest.metadata().is_ok_and(|metadata| metadata.is_file());
        // Does not wait for a process that has a lease on the file.
        let mut open = File::options();
        open.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
        let footer = || Footer::read(&open.open(dest).ok()?).ok();
        match is_file.then(footer).flatten() {
            Some(footer) if footer.id == parent => Err(SnapshotError::ReplacesParent {
                dest: dest.to_owned(),
                parent,
            }),
            _ => Ok(()),
        }
    }

    /// Checks that the marks of a bitmap build on the parent of the image at `dest`, as far as both
    /// are known.
    pub(crate) fn check_marks<K>(
        &self,
        dirty: &DirtyBitmap<K>,
        dest: &Path,
    ) -> Result<(), SnapshotError> {
        match (self.parent(), dirty.parent_id().map(ImageId::from_bytes)) {
            (Parent::Image(parent), Some(newest)) if parent != newest => {
                Err(SnapshotError::StaleParent {
                    dest: dest.into(),
                    parent,
                    newest,
                })
            }
            (Parent::Raw, Some(newest)) => Err(SnapshotError::RawParent {
                dest: dest.into(),
                newest,
            }),
            _ => Ok(()),
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
