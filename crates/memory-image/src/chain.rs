//! A full image and the diffs taken after it, read as one.

pub(crate) mod segments;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use image_format::ImageId;
use page_reader::{PageReader, PopulatedRanges};

use crate::error::{ImageError, Unclear};
use crate::image::Image;
use crate::page_set::PageSet;

/// A full image and the diffs taken after it, oldest first: the guest's RAM as it was at the last of them. Or diffs alone, to be made one.
///
/// The images are opened and looked through once; their bytes are read when asked for. They must not change while the
/// chain is open. A snapshot that is *replaced* by a commit does no harm: the chain goes on reading the old file.
///
/// Sealed images are checked to follow each other: a diff that names another parent than the id below it is refused. What the
/// bytes sum to is for [`Image::verify`].
///
/// Memory: one bit per page and image, and a sealed image's footer.
#[derive(Debug)]
pub struct Chain {
    page_size: u64,
    full: bool,
    /// The oldest first. No page is in two layers: the newest that holds it has it.
    pub(crate) layers: Vec<Layer>,
    /// Directories whose holes were found to be worth believing: each is probed once.
    believed: Vec<PathBuf>,
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) image: Image,
    /// The pages that it speaks for, but the zeros of a full image.
    pages: PageSet,
}

impl Chain {
    /// Opens the full image `base`, of a guest whose snapshots are in pages of `page_size` bytes.
    ///
    /// # Errors
    /// [`ImageError`]: what [`Image::open`] gives, a diff, no whole number of pages, or more of them than there is memory to count.
    pub fn open(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, true)?;
        chain.begun(Image::open(base)?)
    }

    /// With its first image.
    fn begun(mut self, image: Image) -> Result<Self, ImageError> {
        if self.full && image.is_diff() {
            return Err(ImageError::NotFull { path: image.path });
        }
        self.check_pages(&image)?;
        let mut pages = match (&image.footer, self.full) {
            (None, true) => image.stored_pages(self.page_size)?,
            _ => self.pages_of_diff(&image)?,
        };
        if self.full {
            // What no layer has is zeros.
            image.zero_runs().for_each(|zeros| pages.clear(&zeros));
        }
        self.add(Layer { image, pages });
        Ok(self)
    }

    /// Opens images that are all sealed or packed, oldest first, in the smallest of their page sizes: a full one and diffs, or diffs alone.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`push`](Self::push); [`ImageError::NoImages`] for none.
    pub fn open_sealed<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ImageError> {
        let images = paths.iter().map(Image::open_sealed);
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let page_sizes = images
            .iter()
            .filter_map(|image| Some(image.footer()?.page_size));
        let page_size = page_sizes.min().ok_or(ImageError::NoImages)?;
        let mut images = images.into_iter();
        let oldest = images.next().ok_or(ImageError::NoImages)?;
        let mut chain = Self::empty(page_size, !oldest.is_diff())?.begun(oldest)?;
        for image in images {
            chain.push_image(image)?;
        }
        Ok(chain)
    }

    /// Opens the diff `oldest`, to be put together with the diffs taken after it into one. Pages that none of them holds are not known, and not
    /// zeros.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn open_diff(oldest: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, false)?;
        chain.begun(Image::open(oldest)?)
    }

    fn empty(page_size: u64, full: bool) -> Result<Self, ImageError> {
        if !page_size.is_power_of_two() {
            return Err(ImageError::PageSizeNotPowerOfTwo { page_size });
        }
        Ok(Self {
            page_size,
            full,
            layers: Vec::new(),
            believed: Vec::new(),
        })
    }

    /// Adds the diff that was taken next. A sealed one says which pages it holds, and that it was taken on top of the newest image here. The pages of
    /// a raw one are what its file system does not report as holes, where it can be believed
    /// (see the [crate's page](crate#how-pages-are-told-from-gaps)).
    ///
    /// # Errors
    /// [`ImageError::Link`] for a sealed diff that doesn't follow the newest image; [`ImageError::UnclearDiff`] where it can't be told which
    /// pages the diff holds; [`ImageError::SizeDiffers`] or [`ImageError::RegionsDiffer`] for a diff of
    /// another guest; what [`open`](Self::open) gives. The chain stays as it was.
    pub fn push(&mut self, diff: impl AsRef<Path>) -> Result<(), ImageError> {
        self.push_image(Image::open(diff)?)
    }

    pub(crate) fn push_image(&mut self, image: Image) -> Result<(), ImageError> {
        self.check_follows(&image)?;
        let pages = self.pages_of_diff(&image)?;
        self.add(Layer { image, pages });
        Ok(())
    }

    /// Adds the raw diff that was taken next, and takes its holes for what is clean, whether they can be believed or not. Says why they can't:
    /// whoever goes on knows that clean and zero pages of the diff may have been taken for each other.
    ///
    /// # Errors
    /// As [`push`](Self::push), but no [`ImageError::UnclearDiff`].
    pub fn push_by_holes(&mut self, diff: impl AsRef<Path>) -> Result<Option<Unclear>, ImageError> {
        let image = Image::open(diff)?;
        self.check_follows(&image)?;
        let (pages, unclear) = match self.pages_of_diff(&image) {
            Ok(pages) => (pages, None),
            Err(ImageError::UnclearDiff { why, .. }) => {
                (image.stored_pages(self.page_size)?, Some(why))
            }
            Err(error) => return Err(error),
        };
        self.add(Layer { image, pages });
        Ok(unclear)
    }

    /// Adds the raw diff that was taken next, which holds the pages that `runs` (ranges of bytes) touch, whatever its holes
    /// say: the runs of the bitmap that it was written from, say. `once(0..size)` is a diff of every page.
    ///
    /// # Errors
    /// [`ImageError::BadRun`] for a run that is not inside the image; otherwise as [`push`](Self::push). The chain stays
    /// as it was.
    pub fn push_pages(
        &mut self,
        diff: impl AsRef<Path>,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), ImageError> {
        let image = Image::open(diff)?;
        self.check_follows(&image)?;
        let size = image.size;
        let mut pages = image.no_pages(self.page_size)?;
        for Range { start, end } in runs {
            if start > end || end > size {
                return Err(ImageError::BadRun { start, end, size });
            }
            pages.add(&(start..end));
        }
        self.add(Layer { image, pages });
        Ok(())
    }

    fn pages_of_diff(&mut self, image: &Image) -> Result<PageSet, ImageError> {
        match &image.footer {
            None => image.diff_pages(self.page_size, &mut self.believed),
            Some(_) => image.footer_pages(self.page_size),
        }
    }

    /// The size of the guest's RAM in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.base().size
    }

    /// Whether it has a full base, and so all of the RAM.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The id of the state that the chain stands for: its newest image's, if that is sealed.
    #[must_use]
    pub fn id(&self) -> Option<ImageId> {
        self.layers.last().and_then(|layer| layer.image.id())
    }

    /// The page of the images in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// How many images there are, the base among them.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there is always a base")]
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// The paths of the images, the base first.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.images().map(Image::path)
    }

    /// The images, the base first.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.layers.iter().map(|layer| &layer.image)
    }

    /// The runs of pages that any of the images speaks for, ascending, in bytes. Whatever lies between them is zeros; in a chain of diffs, clean.
    pub fn known_runs(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        self.known_pages().into_runs()
    }

    /// The runs of pages that are stored in any of the images, ascending, in bytes. Whatever lies between them is zeros, or, in a chain of diffs,
    /// may be clean.
    pub fn stored_runs(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let mut stored = self.known_pages();
        for layer in &self.layers {
            for zeros in layer.image.zero_runs() {
                // Zeros of this image, unless a newer one has the page.
                layer
                    .pages
                    .runs_in(zeros)
                    .for_each(|run| stored.clear(&run));
            }
        }
        stored.into_runs()
    }

    /// The runs of pages that images above the base speak for.
    pub(crate) fn newer_runs(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let newer = self.layers[1..].iter().map(|layer| layer.pages.clone());
        let newer = newer.reduce(|mut all, pages| {
            all.unite(&pages);
            all
        });
        newer.into_iter().flat_map(PageSet::into_runs)
    }

    fn known_pages(&self) -> PageSet {
        let (base, diffs) = self.layers.split_at(1);
        let mut known = base[0].pages.clone();
        diffs.iter().for_each(|layer| known.unite(&layer.pages));
        known
    }

    pub(crate) fn base(&self) -> &Image {
        &self.layers[0].image
    }

    fn add(&mut self, newest: Layer) {
        self.layers
            .iter_mut()
            .for_each(|older| older.pages.remove(&newest.pages));
        self.layers.push(newest);
    }

    /// The layer that has the page at `offset`, and where its run of pages ends, no later than `end`. `None` is zeros.
    pub(crate) fn owner(&self, offset: u64, end: u64) -> (Option<usize>, u64) {
        let owner_of = |offset| {
            self.layers
                .iter()
                .rposition(|layer| layer.pages.contains(offset))
        };
        let owner = owner_of(offset);
        let mut next = (offset / self.page_size + 1) * self.page_size;
        while next < end && owner_of(next) == owner {
            next += self.page_size;
        }
        (owner, next.min(end))
    }

    /// Fills `buf` from `offset` on; the error names the image.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let end = offset + buf.len() as u64;
        let (mut at, mut rest) = (offset, buf);
        while at < end {
            let (owner, next) = self.owner(at, end);
            let (piece, later) = rest.split_at_mut((next - at) as usize);
            match owner {
                None => piece.fill(0),
                Some(layer) => self.layers[layer].image.read(at, piece)?,
            }
            (at, rest) = (next, later);
        }
        Ok(())
    }
}

/// The guest's RAM, each page from the newest image that holds it.
impl PageReader for Chain {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = offset
            .checked_add(buf.len() as u64)
            .is_some_and(|end| end <= self.size());
        if !inside {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(offset, buf).map_err(|error| match error {
            ImageError::Read { ref source, .. } => io::Error::new(source.kind(), error),
            other => io::Error::other(other),
        })
    }

    /// What is stored; in a chain of diffs, all.
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        if !self.full {
            return Box::new(std::iter::once(range).filter(|range| !range.is_empty()));
        }
        // What lies past the end, a read tells.
        let past = self.size().max(range.start)..range.end;
        let past = std::iter::once(past).filter(|past| !past.is_empty());
        let within = move |run: Range<u64>| run.start.max(range.start)..run.end.min(range.end);
        let stored = self.stored_runs().map(within).filter(|run| !run.is_empty());
        Box::new(stored.chain(past))
    }
}
