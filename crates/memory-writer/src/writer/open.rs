//! Stages memory files.

use std::fs::File;
use std::path::Path;

use atomic_file::AtomicWriter;
#[cfg(doc)]
use atomic_file::Durability;
use dirty_bitmap::Coverage;
use image_format::{HEADER_PAGE, Placement};
use sparse_file::{SpaceError, WriteOptions, ZeroError, grow};

use super::{EpochCheck, MemoryWriter, State};
use crate::error::SnapshotError;
use crate::geometry::Geometry;
use crate::options::MemoryWriterOptions;
use crate::page_record::PageRecord;
use crate::replaced::check_replaced;
use crate::sealing::FooterBuilder;
use crate::stale_pages::StalePages;
use crate::target::Target;
use crate::trace;

impl MemoryWriterOptions {
    /// Stages a memory file of `ram_size` bytes in pages of `page_size` bytes. The file replaces or
    /// creates `dest` when it is committed.
    ///
    /// # Errors
    /// - [`SnapshotError::Ram`] if a size is invalid.
    /// - [`SnapshotError::Open`] if the file cannot be staged.
    /// - [`SnapshotError::MemoryIo`] if the staged file cannot get its size.
    /// - [`SnapshotError::Seal`] if regions or metadata do not fit the footer.
    /// - [`SnapshotError::ReplacesParent`] if the file at `dest` is the image that the
    ///   [seal](crate::Seal::parent) names as the parent, or one of its
    ///   [ancestors](crate::Seal::ancestors). A raw diff is refused by its first write.
    ///
    /// No file is left behind.
    pub fn open(
        &self,
        dest: impl AsRef<Path>,
        ram_size: u64,
        page_size: u64,
    ) -> Result<MemoryWriter, SnapshotError> {
        let geometry = Geometry::new(ram_size, page_size)?;
        self.open_target(Target::Staged(self.stage(dest)?), geometry)
    }

    /// Stages a file for `dest` before the size of the RAM is known, for an image that is still to
    /// be received. [`open_on`](Self::open_on) turns it into a memory file.
    ///
    /// # Errors
    /// Returns [`SnapshotError::Open`] if the file cannot be staged. No file is left behind.
    ///
    /// # Examples
    /// ```
    /// use memory_writer::MemoryWriter;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dest = dir.path().join("full.mem");
    /// // What is known to fail at the commit fails here.
    /// let stage = MemoryWriter::options().stage(&dest)?;
    /// let ram = vec![7; 1 << 20]; // comes by the network, say
    /// let mut writer = MemoryWriter::options().open_on(stage, 1 << 20, 4096)?;
    /// writer.write_full(&ram)?;
    /// writer.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stage(&self, dest: impl AsRef<Path>) -> Result<AtomicWriter, SnapshotError> {
        Ok(self.stage.open(dest)?)
    }

    /// Opens a memory file like [`open`](Self::open), on a file that was [staged](Self::stage) and
    /// is not written. The options of staging and of the commit (durability, mode, links) are those
    /// that were passed to `stage`.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open), except [`SnapshotError::Open`].
    pub fn open_on(
        &self,
        stage: AtomicWriter,
        ram_size: u64,
        page_size: u64,
    ) -> Result<MemoryWriter, SnapshotError> {
        self.open_target(Target::Staged(stage), Geometry::new(ram_size, page_size)?)
    }

    /// Opens a memory file on a file that the caller has opened: a memfd, a file of `O_TMPFILE` or
    /// an inherited descriptor.
    ///
    /// The file must be an empty regular file that is open for reading and writing. Its position is
    /// not used.
    ///
    /// The commit is not atomic: pages are written to the file itself. A crash, an error or a drop
    /// of the writer before the commit leaves a partial file. A partial sealed or packed file is
    /// not recognized as an image, while a partial raw file cannot be distinguished from a complete
    /// one. [`commit`](MemoryWriter::commit) syncs the file unless the
    /// [durability](Self::durability) is [`Durability::None`], and renames nothing. It does not
    /// sync the directory of the file. The options of staging (mode, links, recycling, attributes
    /// to preserve, versions to replace) have no effect.
    ///
    /// A raw diff to a file without a name is refused ([`SnapshotError::AmbiguousDiff`]), because
    /// its holes could not be used to read it back. Choose
    /// [`Layout::Sealed`](crate::Layout::Sealed) or
    /// [`Layout::Packed`](crate::Layout::Packed), or see
    /// [`allow_ambiguous_diff`](Self::allow_ambiguous_diff) for a file that gets its name later.
    ///
    /// To write to a path such as `/proc/self/fd/4` or `/dev/stdout`, which
    /// [`open`](Self::open) refuses, pass the open file here, or to a
    /// [`PackedStream`](crate::PackedStream) if it may be a pipe.
    ///
    /// # Errors
    /// Returns [`SnapshotError::OpenFile`] if the file is not suitable: nothing was written.
    /// Otherwise the errors of [`open`](Self::open), except [`SnapshotError::Open`].
    ///
    /// # Examples
    /// ```
    /// use memory_writer::MemoryWriter;
    ///
    /// let file = tempfile::tempfile()?; // it has no path
    /// let options = MemoryWriter::options();
    /// let mut writer = options.open_file(file.try_clone()?, 1 << 20, 4096)?;
    /// writer.write_full(&vec![7; 1 << 20])?;
    /// writer.commit()?;
    /// assert_eq!(file.metadata()?.len(), 1 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_file(
        &self,
        file: File,
        ram_size: u64,
        page_size: u64,
    ) -> Result<MemoryWriter, SnapshotError> {
        let geometry = Geometry::new(ram_size, page_size)?;
        self.open_target(Target::open(file, self.durability)?, geometry)
    }

    /// Checks that a file which was [staged](Self::stage) does not replace an image that the
    /// [seal](Self::seal) names as needed. [`open_on`](Self::open_on) and the commit check this
    /// too: call it for a diff that is written to the file without a [`MemoryWriter`], such as one
    /// that was received.
    ///
    /// # Errors
    /// Returns [`SnapshotError::ReplacesParent`], unless
    /// [`allow_replacing_parent`](Self::allow_replacing_parent) is set.
    pub fn check_replaced(&self, stage: &AtomicWriter) -> Result<(), SnapshotError> {
        match self.allow_replacing_parent {
            true => Ok(()),
            false => check_replaced(stage, |id| self.seal.needed().any(|needed| needed == id)),
        }
    }

    fn open_target(
        &self,
        staged: Target,
        geometry: Geometry,
    ) -> Result<MemoryWriter, SnapshotError> {
        let Geometry {
            ram_size,
            page_size,
        } = geometry;
        let layout = self.layout;
        let dest = || staged.dest_path().to_owned();
        let footer = match layout.has_footer() {
            false if self.seal.metadata.is_empty() => None,
            false => return Err(SnapshotError::NotSealed { dest: dest() }),
            true => Some(FooterBuilder::new(
                self.seal.clone(),
                layout,
                geometry,
                self.ram_start,
            )),
        };
        let footer = footer
            .transpose()
            .map_err(|error| error.of_snapshot(dest()))?;
        let keeps_parent = !self.allow_replacing_parent && matches!(staged, Target::Staged(_));
        if let (Some(footer), Target::Staged(staged), true) = (&footer, &staged, keeps_parent) {
            check_replaced(staged, |id| footer.needs(id))?;
        }
        let raw_needed = match &footer {
            None => self.seal.needed().collect(),
            Some(_) => Vec::new(),
        };
        let pages = match footer {
            Some(footer) => PageRecord::Footer(footer),
            None if self.allow_ambiguous => PageRecord::Caller,
            None => PageRecord::Empty,
        };
        let start = layout.data_start(page_size);
        match layout.placement() {
            Placement::ByOffset => {
                let len = start.saturating_add(ram_size);
                resize(staged.file(), len)
                    .map_err(|error| SnapshotError::set_size_failed(dest(), len, error))?;
            }
            // The file grows while pages are appended. Another writer must not find an open file
            // empty.
            Placement::Appended if matches!(staged, Target::Open(..)) => {
                resize(staged.file(), start)
                    .map_err(|error| SnapshotError::set_size_failed(dest(), start, error))?;
            }
            Placement::Appended => {}
        }
        if staged.recycled() && layout.has_header() {
            wipe_header(staged.file(), start, &self.write)
                .map_err(|error| SnapshotError::wipe_failed(dest(), error))?;
        }
        let stale_pages = match staged.recycled() {
            true => StalePages::of_new_writes(layout, geometry),
            false => None,
        };
        let recycled = staged.recycled();
        trace::opened(
            staged.dest_path(),
            layout.name(),
            ram_size,
            page_size,
            recycled,
        );
        Ok(MemoryWriter {
            staged,
            geometry,
            layout,
            ram_start: self.ram_start,
            reader_start: None,
            write: self.write.clone(),
            skip: self.skip,
            read_untouched: self.read_untouched,
            reporter: self.reporter.clone(),
            state: State::Empty,
            keeps_parent,
            raw_parent: None,
            raw_needed,
            stale_pages,
            pages,
            written: Coverage::new(),
            check: EpochCheck::None,
        })
    }
}

/// Sets the length of a staged file: grows a new file, and shrinks a recycled file that is longer.
fn resize(file: &File, len: u64) -> Result<(), SpaceError> {
    let shrink = || {
        if file.metadata()?.len() > len {
            file.set_len(len)?;
        }
        Ok(())
    };
    shrink().map_err(|source| SpaceError::Io {
        operation: "shrink the file",
        range: 0..len,
        source,
    })?;
    grow(file, len)
}

/// Overwrites a recycled file with zeros between the header of an image and its first page.
fn wipe_header(file: &File, data_start: u64, options: &WriteOptions) -> Result<(), ZeroError> {
    let header = HEADER_PAGE as u64;
    StalePages::all(header..data_start.max(header), header).wipe(file, options)
}
