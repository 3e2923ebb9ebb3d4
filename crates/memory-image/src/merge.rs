//! A chain as one image.

use std::fs;
use std::path::Path;

use image_format::RAW_UNIT;
use memory_writer::{MemoryWriter, MemoryWriterOptions, Seal, SnapshotError};
use page_reader::ZeroRuns;
use sparse_file::{Pass, Progress, ProgressFn};

use crate::chain::Chain;
use crate::error::{MergeError, ReadImageError, VerifyError};
use crate::image::Image;

impl Chain {
    /// [Verifies](Self::verify) the chain, and writes it as one full raw image, staged beside
    /// `dest` and committed durably with mode 0600; what none of the images stores stays a hole,
    /// unless it is shorter than 32 KiB. `dest` may be one of the chain's own images, as for
    /// [`merge`](Self::merge). Returns the bytes of the pages that the images store.
    ///
    /// # Errors
    /// Returns a [`MergeError`]. Nothing but the files that the error names is left behind.
    pub fn flatten(&self, dest: impl AsRef<Path>) -> Result<u64, MergeError> {
        self.check_full()?;
        self.merge(MemoryWriter::options(), dest)
    }

    /// [Verifies](Self::verify) the chain, and writes it as one image, as `options` say: its
    /// layout, durability, progress. The new image gets new checksums, which would
    /// hide damage of the old ones. [`write_to`](Self::write_to) does not verify. A chain with a
    /// full base becomes a full image, a chain of diffs one diff. Returns the bytes of the pages
    /// that the images store.
    ///
    /// The progress function of `options` gets the verification of each image
    /// ([`Pass::Verify`]), and then the write. It or the token of `options` may cancel both.
    ///
    /// `dest` may be one of the chain's own images. That image is replaced as it was when it was
    /// opened, and no other: what another writer has committed there since stays. See
    /// [`FileVersion`](memory_writer::FileVersion).
    ///
    /// # Errors
    /// Returns a [`MergeError`]. Nothing but the files that the error names is left behind.
    ///
    /// # Examples
    /// ```
    /// use memory_image::Chain;
    /// use memory_writer::{Layout, MemoryWriter};
    /// # let dir = tempfile::tempdir()?;
    /// # let (full, merged) = (dir.path().join("full"), dir.path().join("merged"));
    /// # let sealed = MemoryWriter::options().layout(Layout::Sealed);
    /// # let mut writer = sealed.open(&full, 1 << 20, 4096)?;
    /// # writer.write_full(&vec![1; 1 << 20])?;
    /// # writer.commit()?;
    /// # let diff = full.clone();
    ///
    /// let chain = Chain::open_sealed(&[&full])?; // and its diffs
    /// // The merged image represents the same state as the last diff, so it has the same id.
    /// let options = MemoryWriter::options().layout(Layout::Packed).seal(chain.seal());
    /// chain.merge(options, &merged)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(
        &self,
        options: MemoryWriterOptions,
        dest: impl AsRef<Path>,
    ) -> Result<u64, MergeError> {
        self.verify(&mut |progress| options.report(progress.in_pass(Pass::Verify)))?;
        let dest = dest.as_ref();
        let mut options = options.skip_untouched(true);
        let resolved = fs::canonicalize(dest).ok();
        let is_dest = |image: &&Image| match image.has_path() {
            true => {
                image.path() == dest
                    || (resolved.is_some() && fs::canonicalize(image.path()).ok() == resolved)
            }
            false => image.is_at(dest),
        };
        if let Some(replaced) = self.images().find(is_dest) {
            options = options.replace_only(replaced.version()?);
        }
        let mut writer = options.open(dest, self.ram_size(), self.writable_page_size())?;
        let bytes = self.write_to(&mut writer)?;
        writer.commit()?;
        Ok(bytes)
    }

    /// Writes all pages of the chain to a writer that was just opened, for RAM of
    /// [`ram_size`](Self::ram_size) bytes from address 0 on. [`merge`](Self::merge) calls this and
    /// commits. [Verify](Self::verify) the chain first, unless it was verified already. Returns the
    /// number of bytes in the pages that the images store.
    ///
    /// A chain of diffs is written in pages of its own [size](Self::page_size) or smaller ones: a
    /// larger page would also hold clean memory, whose bytes no diff has.
    ///
    /// If the writer [skips zeros](MemoryWriterOptions::skip_zeros), stored pages of zeros take no
    /// space in the result: they become holes or untouched pages of a full image, and pages that
    /// are recorded as zeros in a sealed or packed diff, never clean ones. A raw diff keeps them,
    /// because its holes are clean pages, and a raw image that shares the blocks of a raw base
    /// keeps those of the base, which take no space of their own.
    ///
    /// # Errors
    /// Returns a [`MergeError`]. After [`LargerPages`](MergeError::LargerPages) nothing was
    /// written. After another error the writer cannot be committed.
    pub fn write_to(&self, writer: &mut MemoryWriter) -> Result<u64, MergeError> {
        if !self.is_full() {
            if writer.page_size() > self.page_size() {
                return Err(MergeError::LargerPages {
                    writer: writer.page_size(),
                    chain: self.page_size(),
                });
            }
            if writer.image_id().is_some() {
                writer.write_zeros(|| self.zero_runs())?;
                self.write_stored(writer)?;
            } else {
                // In a raw diff, a page that is not written is clean.
                self.check_write(writer.write_runs(self, || self.covered_runs()))?;
            }
        } else if self.shares_base(writer)? {
            writer.write_zeros(|| self.zero_runs())?;
            self.check_write(writer.write_runs(self, || self.newer_runs()))?;
        } else {
            self.check_write(writer.write_full(self))?;
        }
        self.check_unchanged()?;
        Ok(self.stored_runs().map(|run| run.end - run.start).sum())
    }

    /// Writes the stored runs to a diff. If the writer skips zeros, runs of zeros are recorded as
    /// zeros, and not stored.
    fn write_stored(&self, writer: &mut MemoryWriter) -> Result<(), MergeError> {
        if !writer.skips_zeros() {
            return self.check_write(writer.write_runs(self, || self.stored_runs()));
        }
        let total = self.stored_runs().map(|run| run.end - run.start).sum();
        let report = |done| {
            let progress = Progress::new(done, total).in_pass(Pass::FindZeros);
            writer.report(progress)
        };
        let found = ZeroRuns::find(self, self.stored_runs(), writer.page_size(), report)?;
        writer.write_zeros(|| found.zeros().iter().cloned())?;
        self.check_write(writer.write_runs(self, || found.data().iter().cloned()))
    }

    /// Verifies the sealed and packed images by [`Image::verify`], oldest first. Raw images have no
    /// checksums and are left out.
    ///
    /// Call this before the first use of images that were stored or copied. Reading, mapping and
    /// restoring a chain do not verify it.
    ///
    /// # Errors
    /// Returns a [`VerifyError`]: [`Damaged`](VerifyError::Damaged) for the first damaged image,
    /// [`Cancelled`](VerifyError::Cancelled) if `progress` breaks. `progress` starts again for each
    /// image.
    pub fn verify(&self, progress: &mut ProgressFn<'_>) -> Result<(), VerifyError> {
        for image in self.images().filter(|image| image.footer().is_some()) {
            let report = image.verify(progress)?;
            if !report.is_ok() {
                return Err(VerifyError::Damaged {
                    path: image.path().to_owned(),
                    report,
                });
            }
        }
        Ok(())
    }

    /// Returns the error of the image that changed, if a write failed for that reason.
    fn check_write<T>(&self, written: Result<T, SnapshotError>) -> Result<(), MergeError> {
        if matches!(written, Err(SnapshotError::Source { .. })) {
            self.check_unchanged()?;
        }
        written?;
        Ok(())
    }

    /// Returns the page size to write the chain in: its [own](Self::page_size), but no less than
    /// the 512 bytes that an image's page has today. Images of version 1 may have smaller ones. A
    /// chain of diffs in smaller pages can't be written: a larger page would also hold clean
    /// memory.
    #[must_use]
    pub fn writable_page_size(&self) -> u64 {
        self.page_size().max(RAW_UNIT)
    }

    /// Checks that no image was resized or written to since it was opened. Call this after the last
    /// read, before the bytes are used. Every other operation on whole chains ends with it.
    ///
    /// A write is detected by the size and the time of modification: see the limitations of
    /// [`FileVersion`](memory_writer::FileVersion). It is missed if it keeps the size and is in the
    /// same step of the file system's clock as the last write before the image was opened, or if it
    /// is a store to a shared mapping whose page was already writable.
    ///
    /// # Errors
    /// Returns a [`ReadImageError`], such as [`Changed`](ReadImageError::Changed).
    pub fn check_unchanged(&self) -> Result<(), ReadImageError> {
        self.images().try_for_each(Image::check_unchanged)
    }

    /// Returns the seal of an image that represents the same state as this chain: its id, its
    /// parent if it is a chain of diffs, its regions, and the metadata of its newest image.
    ///
    /// A raw image records none of these. The regions belong to the guest, so they are taken from
    /// any sealed or packed image of the chain. The id and the metadata belong to one state: if the
    /// newest image is raw, the seal has a new id and no metadata.
    pub fn seal(&self) -> Seal {
        let newest = self.images().last().and_then(|image| image.footer());
        let mut seal = Seal::new();
        if let Some(footer) = self.oldest_sealed().and_then(Image::footer) {
            seal = seal.regions(footer.regions.iter().cloned());
        }
        if let Some(footer) = newest {
            seal = seal.id(footer.id).metadata(footer.metadata.clone());
        }
        let oldest = self.images().next().and_then(|image| image.footer());
        match (self.is_full(), oldest.and_then(|footer| footer.parent())) {
            (true, _) => seal,
            (false, Some(parent)) => seal.parent(parent),
            (false, None) => seal.on_raw_image(),
        }
    }

    /// Makes the image that `writer` writes share the blocks of a raw base, if the file system can
    /// share them. Then only the pages of newer images are written. Returns whether it does.
    fn shares_base(&self, writer: &mut MemoryWriter) -> Result<bool, MergeError> {
        let base = self.base();
        // A range that became zeros may cover a part of a larger page only.
        let pages_fit = writer.page_size() <= self.page_size();
        let is_raw_file = base.footer.is_none() && base.has_file();
        let shares = is_raw_file && pages_fit && writer.reflink_full(&*base.file()?)?;
        Ok(shares)
    }
}
