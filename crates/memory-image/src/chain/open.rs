//! Opens chains, and adds images to them.

use std::ops::Range;
use std::path::Path;

use dirty_bitmap::PageSet;
use sparse_file::PageHoles;

use super::extents::ExtentMap;
use super::segment::SegmentSource;
use super::{Chain, Members};
use crate::error::{ChainError, NotFullError, ReadAmbiguity};
use crate::image::Image;
use crate::trace;

impl Chain {
    /// Opens the full image `base`, sealed or packed, as the base of a chain with pages of
    /// `page_size` bytes.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`NotFull`](ChainError::NotFull) for a diff.
    pub fn open(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ChainError> {
        let chain = Self::empty(page_size, true)?;
        chain.with_base(Image::open(base)?)
    }

    /// Opens the full raw image `base`, as [`open`](Self::open) opens a sealed one.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`NotWholePages`](ChainError::NotWholePages).
    pub fn open_raw(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ChainError> {
        let chain = Self::empty(page_size, true)?;
        chain.with_base(Image::open_raw(base)?)
    }

    /// Creates a chain from an opened image: a full image, or a diff to be merged with later diffs.
    /// A raw image is treated as full.
    ///
    /// # Errors
    /// Returns a [`ChainError`].
    pub fn from_image(oldest: Image, page_size: u64) -> Result<Self, ChainError> {
        let chain = Self::empty(page_size, !oldest.is_diff())?;
        chain.with_base(oldest)
    }

    /// Creates a chain of diffs from an opened diff, as [`open_diff`](Self::open_diff) does. A raw
    /// image is treated as a diff.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`AmbiguousDiff`](ChainError::AmbiguousDiff).
    pub fn from_diff(oldest: Image, page_size: u64) -> Result<Self, ChainError> {
        Self::empty(page_size, false)?.with_base(oldest)
    }

    /// Adds the first image to an empty chain.
    fn with_base(mut self, image: Image) -> Result<Self, ChainError> {
        if self.full && image.is_diff() {
            return Err(NotFullError::new(image.path).into());
        }
        self.check_pages(&image)?;
        let raw_and_full = image.footer.is_none() && self.full;
        let pages = match raw_and_full {
            true => Pages::Listed(image.stored_pages(self.page_size)?),
            false => self.pages_of_diff(&image)?,
        };
        self.add(image, pages);
        Ok(self)
    }

    /// Opens sealed or packed images, oldest first: a full image and diffs, or diffs alone. The
    /// chain uses the smallest of their page sizes.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`NoImages`](ChainError::NoImages) for an empty list.
    pub fn open_sealed<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ChainError> {
        let images = paths.iter().map(Image::open);
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let page_sizes = images
            .iter()
            .filter_map(|image| Some(image.footer()?.page_size));
        let page_size = page_sizes.min().ok_or(ChainError::NoImages)?;
        let mut images = images.into_iter();
        let oldest = images.next().ok_or(ChainError::NoImages)?;
        let mut chain = Self::empty(page_size, !oldest.is_diff())?.with_base(oldest)?;
        for image in images {
            chain.push_image(image)?;
        }
        Ok(chain)
    }

    /// Opens the diff `oldest`, sealed or packed, as the first image of a chain of diffs that are
    /// to be merged into one. Reading a page that none of the diffs holds is
    /// [`ReadImageError::NotInDiffs`](crate::ReadImageError::NotInDiffs).
    ///
    /// # Errors
    /// Returns a [`ChainError`].
    pub fn open_diff(oldest: impl AsRef<Path>, page_size: u64) -> Result<Self, ChainError> {
        let chain = Self::empty(page_size, false)?;
        chain.with_base(Image::open(oldest)?)
    }

    /// Creates a chain of diffs from an opened raw diff whose holes are taken for clean pages, as
    /// [`push_trusting_holes`](Self::push_trusting_holes) does. Also returns why the holes may
    /// be wrong.
    ///
    /// # Errors
    /// Returns a [`ChainError`], except [`AmbiguousDiff`](ChainError::AmbiguousDiff).
    pub fn from_diff_trusting_holes(
        oldest: Image,
        page_size: u64,
    ) -> Result<(Self, Option<ReadAmbiguity>), ChainError> {
        let mut chain = Self::empty(page_size, false)?;
        chain.check_pages(&oldest)?;
        let (pages, ambiguity) = chain.pages_trusting_holes(&oldest)?;
        chain.add(oldest, pages);
        Ok((chain, ambiguity))
    }

    fn empty(page_size: u64, full: bool) -> Result<Self, ChainError> {
        if !page_size.is_power_of_two() {
            return Err(ChainError::PageSizeNotPowerOfTwo { page_size });
        }
        Ok(Self {
            page_size,
            full,
            layers: Vec::new(),
            extents: ExtentMap::default(),
            members: Members::default(),
            ram_layout: None,
            holes: PageHoles::new(),
        })
    }

    /// Adds the next diff, sealed or packed. Its footer lists the pages that it holds and names its
    /// parent, which must be the newest image of the chain.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`Link`](ChainError::Link). The chain is unchanged on
    /// error.
    pub fn push(&mut self, diff: impl AsRef<Path>) -> Result<(), ChainError> {
        self.push_image(Image::open(diff)?)
    }

    /// Adds the next raw diff. The diff holds the pages that its file system does not report as
    /// holes, where that report is trusted (see the [crate
    /// documentation](crate#pages-and-gaps-of-a-raw-diff)).
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`AmbiguousDiff`](ChainError::AmbiguousDiff). The chain is
    /// unchanged on error.
    pub fn push_raw(&mut self, diff: impl AsRef<Path>) -> Result<(), ChainError> {
        self.push_image(Image::open_raw(diff)?)
    }

    /// Adds the next diff, which is already open, as [`push`](Self::push) or
    /// [`push_raw`](Self::push_raw) does.
    ///
    /// # Errors
    /// Returns a [`ChainError`]. The chain is unchanged on error.
    pub fn push_image(&mut self, image: Image) -> Result<(), ChainError> {
        self.check_follows(&image)?;
        let pages = self.pages_of_diff(&image)?;
        self.add(image, pages);
        Ok(())
    }

    /// Adds the next raw diff, and takes its holes for clean pages whether or not they are trusted.
    /// Returns why they are not trusted: clean and zero pages of the diff may then have been
    /// confused with each other.
    ///
    /// # Errors
    /// Returns a [`ChainError`], except [`AmbiguousDiff`](ChainError::AmbiguousDiff). The chain is
    /// unchanged on error.
    pub fn push_trusting_holes(
        &mut self,
        diff: impl AsRef<Path>,
    ) -> Result<Option<ReadAmbiguity>, ChainError> {
        let image = Image::open_raw(diff)?;
        self.check_follows(&image)?;
        let (pages, ambiguity) = self.pages_trusting_holes(&image)?;
        self.add(image, pages);
        Ok(ambiguity)
    }

    /// Returns the pages of a diff by its holes, and why these may be wrong.
    fn pages_trusting_holes(
        &mut self,
        image: &Image,
    ) -> Result<(Pages, Option<ReadAmbiguity>), ChainError> {
        match self.pages_of_diff(image) {
            Ok(pages) => Ok((pages, None)),
            Err(ChainError::AmbiguousDiff { why, .. }) => {
                trace::holes_not_trusted(image.path(), &why);
                let pages = image.pages_by_reported_holes(self.page_size)?;
                Ok((Pages::Listed(pages), Some(why)))
            }
            Err(error) => Err(error),
        }
    }

    /// Adds the next raw diff, which holds the pages that `runs` (ranges of bytes) touch,
    /// regardless of its holes. `runs` may be the runs of the bitmap that the diff was written
    /// from. `once(0..size)` is a diff of every page.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`BadRun`](ChainError::BadRun). The chain is unchanged on
    /// error.
    pub fn push_pages(
        &mut self,
        diff: impl AsRef<Path>,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), ChainError> {
        self.push_image_pages(Image::open_raw(diff)?, runs)
    }

    /// Adds the next raw diff, which is already open, with the pages that `runs` touch, as
    /// [`push_pages`](Self::push_pages) does. Use it for a raw diff without a path.
    ///
    /// # Errors
    /// Returns a [`ChainError`], such as [`BadRun`](ChainError::BadRun), or
    /// [`NotRawDiff`](ChainError::NotRawDiff) for a sealed or packed image. The chain is unchanged
    /// on error.
    ///
    /// # Examples
    /// ```
    /// use memory_image::{Chain, Image, Layout};
    ///
    /// let (full, diff) = (vec![1; 12288], vec![2; 12288]); // in memory, or any `PageReader`
    /// let raw = Image::options().layout(Layout::Raw);
    /// let mut chain = Chain::from_image(raw.open_reader(full, 12288)?, 4096)?;
    /// chain.push_image_pages(raw.open_reader(diff, 12288)?, [4096..8192])?;
    ///
    /// let mut ram = vec![0; 12288];
    /// chain.restore(ram.as_mut_slice())?;
    /// assert_eq!((ram[4095], ram[4096], ram[8192]), (1, 2, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn push_image_pages(
        &mut self,
        image: Image,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), ChainError> {
        if image.footer.is_some() {
            return Err(ChainError::NotRawDiff { path: image.path });
        }
        self.check_follows(&image)?;
        let size = image.size;
        let mut pages = PageSet::new(0..size, self.page_size);
        for Range { start, end } in runs {
            if start > end || end > size {
                return Err(ChainError::BadRun { start, end, size });
            }
            pages.add(&(start..end));
        }
        self.add(image, Pages::Listed(pages));
        Ok(())
    }

    fn pages_of_diff(&mut self, image: &Image) -> Result<Pages, ChainError> {
        match &image.footer {
            None => {
                let pages = image.diff_pages(self.page_size, &mut self.holes)?;
                Ok(Pages::Listed(pages))
            }
            Some(_) => Ok(Pages::InFooter),
        }
    }

    fn add(&mut self, newest: Image, pages: Pages) {
        let layer = self.layers.len();
        let omit_zeros = layer == 0 && self.full;
        let mut add = |range: Range<u64>, stored: Option<u64>| match stored {
            Some(offset) => self
                .extents
                .add(range, SegmentSource::Stored { layer, offset }),
            // Pages that are in no layer are zeros.
            None if omit_zeros => {}
            None => self.extents.add(range, SegmentSource::Zero),
        };
        match pages {
            Pages::InFooter => {
                let runs = newest.footer.iter().flat_map(|footer| &footer.runs);
                runs.for_each(|run| add(run.range(), run.stored_at(run.start)));
            }
            Pages::Listed(pages) => {
                for Range { start: mut at, end } in pages.runs() {
                    while at < end {
                        let (stored, next) = newest.locate(at);
                        add(at..next.min(end), stored);
                        at = next;
                    }
                }
            }
        }
        let sealed = newest.footer().is_some();
        trace::image_added(layer, newest.path(), newest.ram_size(), sealed);
        if self.ram_layout.is_none() {
            self.ram_layout = newest.ram_layout();
        }
        self.members.add(layer, &newest);
        self.layers.push(newest);
    }
}

/// The pages that a layer covers.
enum Pages {
    /// The pages in the runs of its footer.
    InFooter,
    /// The listed pages, at the positions that its footer gives, if it has one.
    Listed(PageSet),
}
