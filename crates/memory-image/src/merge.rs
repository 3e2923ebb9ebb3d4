//! A chain as one image.

use std::ops::Range;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{MemoryWriter, Options, Seal};

use crate::chain::Chain;
use crate::compare::MAX_PAGES;
use crate::error::ImageError;

impl Chain {
    /// Writes the chain as one full raw image, staged beside `dest` and committed durably with mode 0600; what none of the images
    /// stores stays a hole, unless it is shorter than 32 KiB. `dest` may be one of the chain's own images. Returns the bytes of the pages that the images store.
    ///
    /// # Errors
    /// [`ImageError::NotFull`] for a chain of diffs; [`ImageError::Merge`], which says what `dest` is. Nothing is left behind but what the error names.
    pub fn flatten(&self, dest: impl AsRef<Path>) -> Result<u64, ImageError> {
        self.check_full()?;
        self.merge(MemoryWriter::options(), dest)
    }

    /// Writes the chain as one image, as `options` say: its layout, durability, progress. A chain with a full base becomes a full image, a chain of
    /// diffs one diff. `dest` may be one of the chain's own images. Returns the bytes of the pages that the images store.
    ///
    /// # Errors
    /// [`ImageError::Merge`], which says what `dest` is. Nothing is left behind but what the error names.
    ///
    /// # Examples
    /// ```
    /// use memory_image::Chain;
    /// use memory_writer::{Layout, MemoryWriter};
    /// # use memory_writer::Seal;
    /// # let dir = tempfile::tempdir()?;
    /// # let (full, merged) = (dir.path().join("full"), dir.path().join("merged"));
    /// # let mut writer = MemoryWriter::options().layout(Layout::Sealed(Seal::new())).open(&full, 1 << 20, 4096)?;
    /// # writer.write_full(&vec![1; 1 << 20])?;
    /// # writer.commit()?;
    /// # let diff = full.clone();
    ///
    /// let chain = Chain::open_sealed(&[&full])?; // and its diffs
    /// // The seal of the merged image says that it stands for the same state as the last diff.
    /// let options = MemoryWriter::options().layout(Layout::Packed(chain.seal()));
    /// chain.merge(options, &merged)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn merge(&self, options: Options, dest: impl AsRef<Path>) -> Result<u64, ImageError> {
        let options = options.ram_start(0).skip_untouched(true);
        let mut writer = options.open(dest, self.size(), self.page_size())?;
        let bytes = self.write_to(&mut writer)?;
        writer.commit()?;
        Ok(bytes)
    }

    /// Writes all that the chain holds by a writer that was just opened, for RAM of [`size`](Self::size) bytes from address 0 on: what
    /// [`merge`](Self::merge) does before it commits. Returns the bytes of the pages that the images store.
    ///
    /// A chain of diffs is written in pages of its own [size](Self::page_size) or smaller ones: a larger page would also hold clean memory, whose bytes
    /// no diff has.
    ///
    /// # Errors
    /// [`ImageError::LargerPages`] for a chain of diffs and a writer of larger pages: nothing was written, and the writer stays as it was.
    /// [`ImageError::Merge`]; the writer can't be committed then.
    pub fn write_to(&self, writer: &mut MemoryWriter) -> Result<u64, ImageError> {
        if !self.is_full() {
            if writer.page_size() > self.page_size() {
                return Err(ImageError::LargerPages {
                    writer: writer.page_size(),
                    chain: self.page_size(),
                });
            }
            let pages = writer.write_diff(self, &self.bitmap(self.known_runs())?)?;
            return Ok(pages * writer.page_size());
        }
        let base = self.base();
        // Of a raw base, only what newer images have is written, if its blocks can be had.
        if base.footer.is_none() && writer.share_full(&*base.file()?)? {
            writer.write_diff(self, &self.bitmap(self.newer_runs())?)?;
        } else {
            writer.write_full(self)?;
        }
        Ok(self.stored_runs().map(|run| run.end - run.start).sum())
    }

    /// The seal of an image that stands for the same state as this chain: its id, its parent if it is a chain of diffs, its regions, and
    /// the metadata of its newest image.
    pub fn seal(&self) -> Seal {
        let newest = self.images().last().and_then(|image| image.footer());
        let mut seal = Seal::new();
        if let Some(footer) = newest {
            seal = seal
                .id(footer.id)
                .regions(footer.regions.iter().cloned())
                .metadata(footer.metadata.clone());
        }
        let oldest = self.images().next().and_then(|image| image.footer());
        match (self.is_full(), oldest.and_then(|footer| footer.parent())) {
            (true, _) => seal,
            (false, Some(parent)) => seal.parent(parent),
            (false, None) => seal.on_raw_image(),
        }
    }

    fn bitmap(&self, runs: impl Iterator<Item = Range<u64>>) -> Result<DirtyBitmap, ImageError> {
        let (size, page_size) = (self.size(), self.page_size());
        let too_many = || self.base().too_many_pages(page_size);
        if size / page_size > MAX_PAGES {
            return Err(too_many());
        }
        let pages = DirtyBitmap::new(0, size, page_size).map_err(|_| too_many())?;
        for run in runs {
            pages
                .set_range(run.start, run.end - run.start)
                .expect("a chain's runs are inside its RAM");
        }
        Ok(pages)
    }
}
