//! Completes and commits the staged file.

use std::ops::Deref;

use atomic_file::{AtomicWriter, Durability};
use dirty_bitmap::{DirtyBitmap, Epoch, ParentImage, ReleaseError};
use image_format::ImageId;

use super::{EpochCheck, MemoryWriter, State};
use crate::error::{MemoryIoStep, SnapshotError};
use crate::page_record::PageRecord;
use crate::sealing::FooterBuilder;
use crate::target::Target;

impl MemoryWriter {
    /// Syncs the file, renames it to its destination, and syncs the directory. Once this has
    /// returned, the snapshot survives a power loss (see
    /// [`MemoryWriterOptions::durability`](crate::MemoryWriterOptions::durability)).
    ///
    /// # Errors
    /// - [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`],
    ///   [`SnapshotError::MemoryIo`] (a recycled file could not be wiped),
    ///   [`SnapshotError::AmbiguousDiff`], [`SnapshotError::ReplacesParent`] and
    ///   [`SnapshotError::Seal`]: the destination is unchanged.
    /// - [`SnapshotError::Commit`] states whether the old or the new file is at the destination.
    ///
    /// No file is left behind except those that the error names.
    ///
    /// An [open file](crate::MemoryWriterOptions::open_file) is completed and synced, and not
    /// renamed. It is partial after an error.
    pub fn commit(self) -> Result<(), SnapshotError> {
        match self.complete()? {
            Target::Staged(staged) => Ok(staged.commit()?),
            Target::Open(_, Durability::None) => Ok(()),
            open @ Target::Open(..) => {
                let synced = open.file().sync_all();
                synced.map_err(|source| SnapshotError::MemoryIo {
                    dest: open.dest_path().to_owned(),
                    step: MemoryIoStep::Sync,
                    offset: 0,
                    source,
                })
            }
        }
    }

    /// Commits as [`commit`](Self::commit) does, and then releases the epoch whose pages were
    /// written. On any error, the marks are restored to the bitmap.
    ///
    /// First [checks](Self::check_epoch) that every page of the epoch was written. Commits nothing
    /// if the epoch was [reclaimed](DirtyBitmap::reclaim_epoch): a later save may have committed
    /// its own file. The epoch cannot be reclaimed while the commit runs.
    ///
    /// The bitmap then has the [id](MemoryWriter::image_id) of the snapshot as its
    /// [parent](DirtyBitmap::parent): a diff of it that names another one is refused.
    ///
    /// The marks are released when the commit returns, at any
    /// [durability](crate::MemoryWriterOptions::durability). With
    /// [`Durability::Full`](crate::Durability::Full) the file then survives a power loss. With less
    /// durability a power loss may remove it: later snapshots that are durable then lack its pages,
    /// and a chain that contains an empty or torn raw file restores wrong memory without an error.
    ///
    /// # Errors
    /// - [`SnapshotError::Incomplete`] (an earlier write failed), [`SnapshotError::BitmapSize`],
    ///   [`SnapshotError::BitmapStart`], [`SnapshotError::EpochNotWritten`] and
    ///   [`SnapshotError::EpochReclaimed`]: nothing was committed.
    /// - Otherwise as [`commit`](Self::commit).
    pub fn commit_and_release<K, B: Deref<Target = DirtyBitmap<K>>>(
        mut self,
        mut epoch: Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        self.check_epoch(&mut epoch)?;
        let dest = self.staged.dest_path().to_owned();
        epoch
            .release_after(|| self.commit())
            .map_err(|error| match error {
                ReleaseError::Commit(error) => error,
                ReleaseError::Extended(_) => SnapshotError::EpochNotWritten { dest },
                ReleaseError::Reclaimed(source) => SnapshotError::EpochReclaimed { dest, source },
            })
    }

    /// Checks that every page whose mark `epoch` holds was written after the mark was taken.
    ///
    /// [`commit_and_release`](Self::commit_and_release) includes this check. Call it where the file
    /// is committed as part of a group: before [`finish`](Self::finish), which
    /// [`Epoch::release_after`] may run together with the commit of the group.
    ///
    /// Passes the [id](Self::image_id) of the snapshot to [`Epoch::set_image`]: once the epoch is
    /// released, a diff that names another parent is refused.
    ///
    /// The epoch then [releases](Epoch::check_written) only the marks that were checked. After
    /// another [`Epoch::extend`] that found marks, write them and call this again. After a
    /// [`reflink_full`](Self::reflink_full) that follows the check, the file can't be completed.
    ///
    /// If neither [`MemoryWriterOptions::ram_start`](crate::MemoryWriterOptions::ram_start) nor a
    /// diff has set the start of the RAM, the check takes it from the epoch's bitmap, so that a
    /// full image and the diffs on top of it name the same addresses. `finish` writes the
    /// addresses, so the check must come first.
    ///
    /// Only writes of this writer count: a [full write](Self::write_full) that began after the
    /// marks were taken, and [diffs](Self::write_diff) of [`Epoch::bitmap`] or of a bitmap that
    /// [`Epoch::extend`] returned. A diff of the bitmap that the guest marks does not count.
    /// [`reflink_full`](Self::reflink_full) does not count and undoes the writes before it. A
    /// [clean](DirtyBitmap::is_clean) part needs no write.
    ///
    /// The check compares the size and the known start of the RAM. It cannot determine whether a
    /// full write read the RAM that the epoch's bitmap covers.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Incomplete`] if an earlier write failed, and otherwise
    /// [`SnapshotError::EpochNotWritten`], [`SnapshotError::BitmapSize`] and
    /// [`SnapshotError::BitmapStart`].
    pub fn check_epoch<K, B: Deref<Target = DirtyBitmap<K>>>(
        &mut self,
        epoch: &mut Epoch<B, K>,
    ) -> Result<(), SnapshotError> {
        // Its pages are missing because a write failed, not because it was not made.
        if self.state == State::Incomplete {
            return Err(self.incomplete());
        }
        self.check_bitmap(epoch.bitmap())?;
        // An epoch without marks needs no write, whose checks would find another parent.
        self.check_marks(epoch.bitmap())?;
        // An epoch that was checked before may be another one.
        if self.check == EpochCheck::Undone || !epoch.check_written(&self.written) {
            return Err(self.epoch_not_written());
        }
        self.check = EpochCheck::Made;
        self.set_ram_start(epoch.bitmap().ram_start());
        let id = self.image_id().map(ImageId::to_bytes);
        epoch.set_image(ParentImage::of_image(id));
        Ok(())
    }

    /// Completes the staged file and returns it, for a commit as part of an
    /// [`atomic_file::AtomicGroup`]: for example together with the state of the vCPUs.
    ///
    /// The compiler warns if the result is dropped, which leaves no snapshot:
    /// ```compile_fail
    /// #![deny(unused_must_use)]
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let writer = memory_writer::MemoryWriter::open("full.mem", 1 << 20, 4096)?;
    /// writer.finish()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Returns [`SnapshotError::NothingWritten`], [`SnapshotError::Incomplete`],
    /// [`SnapshotError::MemoryIo`] (a recycled file could not be wiped),
    /// [`SnapshotError::AmbiguousDiff`], [`SnapshotError::ReplacesParent`],
    /// [`SnapshotError::EpochNotWritten`] (other bytes replaced the pages of an epoch after its
    /// check) and [`SnapshotError::Seal`]: the destination is unchanged and no file is left behind.
    /// Returns [`SnapshotError::NotStaged`] for an [open
    /// file](crate::MemoryWriterOptions::open_file).
    pub fn finish(self) -> Result<AtomicWriter, SnapshotError> {
        match self.complete()? {
            Target::Staged(staged) => Ok(staged),
            open @ Target::Open(..) => Err(SnapshotError::NotStaged {
                dest: open.dest_path().to_owned(),
            }),
        }
    }

    fn epoch_not_written(&self) -> SnapshotError {
        SnapshotError::EpochNotWritten {
            dest: self.staged.dest_path().to_owned(),
        }
    }

    /// Completes the file.
    fn complete(self) -> Result<Target, SnapshotError> {
        let dest = || self.staged.dest_path().to_owned();
        match self.state {
            State::Complete => {}
            State::Incomplete => return Err(self.incomplete()),
            State::Empty => return Err(SnapshotError::NothingWritten { dest: dest() }),
        }
        if self.check == EpochCheck::Undone {
            return Err(self.epoch_not_written());
        }
        let footer = self.pages.footer();
        let written = footer.map_or(self.geometry.ram_size, FooterBuilder::data_end);
        self.staged.check_len(written)?;
        let file = self.staged.file();
        if let Some(stale_pages) = &self.stale_pages {
            stale_pages
                .wipe(file, &self.write)
                .map_err(|error| SnapshotError::wipe_failed(dest(), error))?;
        }
        // Another writer may have put it there.
        self.check_replaced(self.raw_parent)?;
        match self.pages {
            PageRecord::Holes(diff) => {
                diff.check_written(file)
                    .map_err(|source| SnapshotError::AmbiguousDiff {
                        dest: dest(),
                        source,
                    })?;
            }
            PageRecord::Footer(footer) => {
                footer
                    .seal(file)
                    .map_err(|error| error.of_snapshot(dest()))?;
            }
            PageRecord::Empty | PageRecord::All | PageRecord::Caller => {}
        }
        Ok(self.staged)
    }
}
