//! Checks before pages are written.

use dirty_bitmap::DirtyBitmap;
use image_format::{FooterError, ImageId};
use page_reader::PageReader;

use super::{MemoryWriter, State};
use crate::error::{SnapshotError, WriteAmbiguity};
use crate::page_record::PageRecord;
use crate::raw_diff::RawDiff;
use crate::replaced::check_replaced;
use crate::target::Target;
use crate::write_pass::Plan;

impl MemoryWriter {
    /// Checks that all of the RAM may be written.
    pub(super) fn check_full(&self) -> Result<(), SnapshotError> {
        let footer = self.pages.footer();
        footer.map_or(Ok(()), |it| it.check_full(self.dest_path()))
    }

    /// Checks that a bitmap covers this RAM, as far as the RAM's range is known.
    pub(super) fn check_bitmap<K>(&self, bitmap: &DirtyBitmap<K>) -> Result<(), SnapshotError> {
        self.geometry
            .check_bitmap(bitmap, self.ram_start, self.reader_start)
    }

    /// Checks that the marks of a bitmap build on the parent of a sealed or packed diff.
    pub(super) fn check_marks<K>(&self, bitmap: &DirtyBitmap<K>) -> Result<(), SnapshotError> {
        let footer = self.pages.footer();
        footer.map_or(Ok(()), |it| it.check_marks(bitmap, self.dest_path()))
    }

    /// Returns the image that the marks of a bitmap build on, if this is a raw diff and the image
    /// is known.
    pub(super) fn raw_parent_of<K>(&self, bitmap: &DirtyBitmap<K>) -> Option<ImageId> {
        match self.pages {
            PageRecord::Empty | PageRecord::Holes(_) | PageRecord::Caller => {
                bitmap.parent_id().map(ImageId::from_bytes)
            }
            PageRecord::All | PageRecord::Footer(_) => None,
        }
    }

    /// Checks that a diff does not replace an image that it needs: those of its seal, and
    /// `raw_parent` if it is raw.
    pub(super) fn check_replaced(&self, raw_parent: Option<ImageId>) -> Result<(), SnapshotError> {
        let needs = |id| match &self.pages {
            PageRecord::Footer(footer) => footer.needs(id),
            PageRecord::All => false,
            PageRecord::Empty | PageRecord::Holes(_) | PageRecord::Caller => {
                Some(id) == raw_parent || self.raw_needed.contains(&id)
            }
        };
        match &self.staged {
            Target::Staged(staged) if self.keeps_parent => check_replaced(staged, needs),
            Target::Staged(_) | Target::Open(..) => Ok(()),
        }
    }

    /// Checks the same for a raw diff before its pages are written. Other images are checked when
    /// they are opened.
    pub(super) fn check_raw_replaced(
        &self,
        raw_parent: Option<ImageId>,
    ) -> Result<(), SnapshotError> {
        match raw_parent.is_none() && self.raw_needed.is_empty() {
            true => Ok(()),
            false => self.check_replaced(raw_parent),
        }
    }

    /// Sets the start of the RAM to that of a bitmap that was [checked](Self::check_bitmap).
    pub(super) fn set_ram_start(&mut self, ram_start: u64) {
        self.ram_start = Some(ram_start);
        if let PageRecord::Footer(footer) = &mut self.pages {
            footer.set_ram_start(ram_start);
        }
    }

    /// Checks that a sealed or packed file records the regions that the reader has, and that the
    /// file has the size of the reader's RAM.
    pub(super) fn check_layout<R: PageReader + ?Sized>(
        &self,
        reader: &R,
    ) -> Result<(), SnapshotError> {
        // A raw file does not record regions.
        if let Some(footer) = self.pages.footer() {
            footer.check_reader(reader, self.dest_path())?;
        }
        self.geometry.check_reader(reader, self.dest_path())
    }

    /// Records the regions of a reader that was [checked](Self::check_layout).
    pub(super) fn set_layout<R: PageReader + ?Sized>(&mut self, reader: &R) {
        if let PageRecord::Footer(footer) = &mut self.pages {
            footer.set_regions_of(reader);
        }
    }

    /// Checks that a chain accepts a sealed or packed diff.
    pub(super) fn check_parent(&self) -> Result<(), SnapshotError> {
        let footer = self.pages.footer();
        footer.map_or(Ok(()), |it| it.check_parent(self.dest_path()))
    }

    /// Checks that a footer can list `runs` runs.
    pub(super) fn check_room(&self, runs: u64) -> Result<(), SnapshotError> {
        let footer = self.pages.footer();
        let room = footer.map_or(Ok(()), |footer| footer.check_room(runs));
        room.map_err(|source| self.cannot_seal(source))
    }

    pub(super) fn cannot_seal(&self, source: FooterError) -> SnapshotError {
        SnapshotError::Seal {
            dest: self.staged.dest_path().to_owned(),
            source,
        }
    }

    /// Checks that a raw diff with the pages of `plan` can be read back.
    pub(super) fn check_raw_diff(&mut self, plan: &Plan) -> Result<(), SnapshotError> {
        let Plan::Raw(pages) = plan else {
            return Ok(());
        };
        if self.state == State::Incomplete {
            return Ok(());
        }
        self.check_raw_diff_has_name()?;
        let mut check = || {
            if matches!(self.pages, PageRecord::Empty) {
                let begun = RawDiff::begin(self.staged.file(), self.geometry)?;
                self.pages = PageRecord::Holes(begun);
            }
            match &self.pages {
                PageRecord::Holes(diff) => diff.check_hole_is_left(pages),
                PageRecord::Empty
                | PageRecord::All
                | PageRecord::Caller
                | PageRecord::Footer(_) => Ok(()),
            }
        };
        check().map_err(|source| self.ambiguous(source))
    }

    /// Checks that a raw diff is not written to a file without a name, whose holes no reader uses.
    pub(super) fn check_raw_diff_has_name(&self) -> Result<(), SnapshotError> {
        match self.pages {
            PageRecord::Empty if self.staged.is_nameless() => {
                Err(self.ambiguous(WriteAmbiguity::NoName))
            }
            _ => Ok(()),
        }
    }

    fn ambiguous(&self, source: WriteAmbiguity) -> SnapshotError {
        SnapshotError::AmbiguousDiff {
            dest: self.staged.dest_path().to_owned(),
            source,
        }
    }
}
