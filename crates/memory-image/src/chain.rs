//! A full image and the diffs taken after it, read as one.

mod extents;
pub(crate) mod segments;

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::Path;

use image_format::ImageId;
use page_reader::{PageReader, PopulatedRanges};
use sparse_file::PageHoles;

use crate::error::{ImageError, Unclear};
use crate::image::Image;
use crate::page_set::{PageSet, joined};
use extents::ExtentMap;
use segments::{Segment, Source};

/// A full image and the diffs taken after it, oldest first: the guest's RAM as it was at the last of them. Or diffs alone, to be made one.
///
/// A chain of diffs alone knows only the pages that its diffs hold ([`known_runs`](Self::known_runs)). Reading another page is
/// [`ImageError::NotInDiffs`]: the page was clean, and its bytes are in an older image.
///
/// The images are opened and looked through once; their bytes are read when asked for. They must not change while the
/// chain is open.
///
/// Sealed images are checked to follow each other: a diff that names another parent than the id below it is refused. What the
/// bytes sum to is for [`Image::verify`].
///
/// An id names a state, so an id may come again: a diff that leads back to an older state has its id. What is refused is the same file twice, and an image
/// whose id is in the chain and whose parent is not the newest image.
///
/// # Many images
/// A chain may have any number of images. Opening one more, and reading a byte, takes time that grows with the logarithm of their number.
///
/// Memory: at most 64 bytes for each run of pages that is contiguous in one image's file and in no newer image, and what each [`Image`]
/// takes: some 1,000 bytes, and of a sealed one its footer. Nothing grows with the size of the RAM.
///
/// Descriptors: this process keeps at most a quarter of the descriptors that it may have (`RLIMIT_NOFILE`) open for images. While all images fit, a file that is replaced by a commit, or removed, does no harm: the chain goes on reading the old
/// one. Beyond that the file that was opened first is closed, and opened again when it is read, by its absolute path. If that leads to another file by then, or
/// to one that was written to, the read fails with [`ImageError::Replaced`]; it never returns other bytes. So leave the images of a
/// long chain in place while it is in use, [merge](Self::merge) it, or raise the limit before opening it, above all in a process that gives up
/// the right to open files. An image that can't be found by its path (a memfd, a file without a name) stays open.
#[derive(Debug)]
pub struct Chain {
    page_size: u64,
    full: bool,
    /// The oldest first.
    pub(crate) layers: Vec<Image>,
    /// Where every page of the RAM is, but the zeros of a full base.
    extents: ExtentMap,
    pub(crate) members: Members,
    /// What was found out about the file systems of raw diffs.
    holes: PageHoles,
}

/// What images of a chain are compared with.
#[derive(Debug, Default)]
pub(crate) struct Members {
    ids: HashSet<ImageId>,
    /// Devices and inodes.
    files: HashSet<(u64, u64)>,
    /// The oldest layer that has a footer.
    sealed: Option<usize>,
}

impl Members {
    pub(crate) fn has_file_of(&self, image: &Image) -> bool {
        self.files.contains(&image.identity)
    }

    pub(crate) fn has_id_of(&self, image: &Image) -> bool {
        image.id().is_some_and(|id| self.ids.contains(&id))
    }

    fn add(&mut self, layer: usize, image: &Image) {
        self.ids.extend(image.id());
        self.files.insert(image.identity);
        if image.footer().is_some() {
            self.sealed.get_or_insert(layer);
        }
    }
}

impl Chain {
    /// Opens the full image `base`, sealed or packed, of a guest whose snapshots are in pages of `page_size` bytes.
    ///
    /// # Errors
    /// [`ImageError`]: what [`Image::open`] gives, a diff, or no whole number of pages.
    pub fn open(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, true)?;
        chain.begun(Image::open(base)?)
    }

    /// As [`open`](Self::open), of a raw image.
    ///
    /// # Errors
    /// What [`Image::open_raw`] gives; otherwise as [`open`](Self::open).
    pub fn open_raw(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, true)?;
        chain.begun(Image::open_raw(base)?)
    }

    /// Begins with an image that was opened: a full one, or a diff to be put together with those taken after it. A raw image is taken for a full one.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`open_diff`](Self::open_diff).
    pub fn from_image(oldest: Image, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, !oldest.is_diff())?;
        chain.begun(oldest)
    }

    /// Begins with a diff that was opened, as [`open_diff`](Self::open_diff) does: a raw image is taken for a diff.
    ///
    /// # Errors
    /// As [`open_diff`](Self::open_diff).
    pub fn from_diff(oldest: Image, page_size: u64) -> Result<Self, ImageError> {
        Self::empty(page_size, false)?.begun(oldest)
    }

    /// With its first image.
    fn begun(mut self, image: Image) -> Result<Self, ImageError> {
        if self.full && image.is_diff() {
            return Err(ImageError::NotFull { path: image.path });
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

    /// Opens images that are all sealed or packed, oldest first, in the smallest of their page sizes: a full one and diffs, or diffs alone.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`push`](Self::push); [`ImageError::NoImages`] for none.
    pub fn open_sealed<P: AsRef<Path>>(paths: &[P]) -> Result<Self, ImageError> {
        let images = paths.iter().map(Image::open);
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

    /// Opens the diff `oldest`, sealed or packed, to be put together with the diffs taken after it into one. Pages that none of them holds are not known:
    /// reading one is [`ImageError::NotInDiffs`].
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn open_diff(oldest: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        let chain = Self::empty(page_size, false)?;
        chain.begun(Image::open(oldest)?)
    }

    /// Begins with a raw diff that was opened, as [`from_diff`](Self::from_diff) does, and takes its holes for what is clean, as
    /// [`push_by_holes`](Self::push_by_holes) does. Says why they may be wrong.
    ///
    /// # Errors
    /// As [`from_diff`](Self::from_diff), but no [`ImageError::UnclearDiff`].
    pub fn from_diff_by_holes(
        oldest: Image,
        page_size: u64,
    ) -> Result<(Self, Option<Unclear>), ImageError> {
        let mut chain = Self::empty(page_size, false)?;
        chain.check_pages(&oldest)?;
        let (pages, unclear) = chain.pages_by_holes(&oldest)?;
        chain.add(oldest, pages);
        Ok((chain, unclear))
    }

    fn empty(page_size: u64, full: bool) -> Result<Self, ImageError> {
        if !page_size.is_power_of_two() {
            return Err(ImageError::PageSizeNotPowerOfTwo { page_size });
        }
        Ok(Self {
            page_size,
            full,
            layers: Vec::new(),
            extents: ExtentMap::default(),
            members: Members::default(),
            holes: PageHoles::new(),
        })
    }

    /// Adds the diff that was taken next, sealed or packed. It says which pages it holds, and that it was taken on top of the newest image here.
    ///
    /// # Errors
    /// [`ImageError::Link`] for a diff that doesn't follow the newest image; [`ImageError::SizeDiffers`] or [`ImageError::RegionsDiffer`] for a diff of
    /// another guest; what [`open`](Self::open) gives. The chain stays as it was.
    pub fn push(&mut self, diff: impl AsRef<Path>) -> Result<(), ImageError> {
        self.push_image(Image::open(diff)?)
    }

    /// Adds the raw diff that was taken next. Its pages are what its file system does not report as holes, where it can be believed
    /// (see the [crate's page](crate#how-pages-are-told-from-gaps)).
    ///
    /// # Errors
    /// [`ImageError::UnclearDiff`] where it can't be told which pages the diff holds; otherwise as [`push`](Self::push).
    pub fn push_raw(&mut self, diff: impl AsRef<Path>) -> Result<(), ImageError> {
        self.push_image(Image::open_raw(diff)?)
    }

    /// Adds the diff that was taken next and opened, as [`push`](Self::push) or [`push_raw`](Self::push_raw) does.
    ///
    /// # Errors
    /// As these.
    pub fn push_image(&mut self, image: Image) -> Result<(), ImageError> {
        self.check_follows(&image)?;
        let pages = self.pages_of_diff(&image)?;
        self.add(image, pages);
        Ok(())
    }

    /// Adds the raw diff that was taken next, and takes its holes for what is clean, whether they can be believed or not. Says why they can't:
    /// whoever goes on knows that clean and zero pages of the diff may have been taken for each other.
    ///
    /// # Errors
    /// As [`push_raw`](Self::push_raw), but no [`ImageError::UnclearDiff`].
    pub fn push_by_holes(&mut self, diff: impl AsRef<Path>) -> Result<Option<Unclear>, ImageError> {
        let image = Image::open_raw(diff)?;
        self.check_follows(&image)?;
        let (pages, unclear) = self.pages_by_holes(&image)?;
        self.add(image, pages);
        Ok(unclear)
    }

    /// The pages of a diff by its holes, and why these may be wrong.
    fn pages_by_holes(&mut self, image: &Image) -> Result<(Pages, Option<Unclear>), ImageError> {
        match self.pages_of_diff(image) {
            Ok(pages) => Ok((pages, None)),
            Err(ImageError::UnclearDiff { why, .. }) => {
                let pages = image.pages_by_reported_holes(self.page_size)?;
                Ok((Pages::Listed(pages), Some(why)))
            }
            Err(error) => Err(error),
        }
    }

    /// Adds the raw diff that was taken next, which holds the pages that `runs` (ranges of bytes) touch, whatever its holes
    /// say: the runs of the bitmap that it was written from, say. `once(0..size)` is a diff of every page.
    ///
    /// # Errors
    /// [`ImageError::BadRun`] for a run that is not inside the image; otherwise as [`push_raw`](Self::push_raw). The chain stays
    /// as it was.
    pub fn push_pages(
        &mut self,
        diff: impl AsRef<Path>,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<(), ImageError> {
        let image = Image::open_raw(diff)?;
        self.check_follows(&image)?;
        let size = image.size;
        let mut pages = PageSet::new(self.page_size);
        for Range { start, end } in runs {
            if start > end || end > size {
                return Err(ImageError::BadRun { start, end, size });
            }
            pages.add(&(start..end));
        }
        self.add(image, Pages::Listed(pages));
        Ok(())
    }

    fn pages_of_diff(&mut self, image: &Image) -> Result<Pages, ImageError> {
        match &image.footer {
            None => {
                let pages = image.diff_pages(self.page_size, &mut self.holes)?;
                Ok(Pages::Listed(pages))
            }
            Some(_) => Ok(Pages::InFooter),
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
        self.layers.last().and_then(Image::id)
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
        self.layers.iter().map(Image::path)
    }

    /// The images, the base first.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.layers.iter()
    }

    /// The runs of pages that any of the images speaks for, ascending, in bytes. Whatever lies between them is zeros; in a chain of diffs, clean.
    pub fn known_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(0..self.size(), |source| source != Source::Nowhere)
    }

    /// The runs of pages that are stored in any of the images, ascending, in bytes. Whatever lies between them is zeros, or, in a chain of diffs,
    /// may be clean.
    pub fn stored_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.stored_in(0..self.size())
    }

    fn stored_in(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        self.runs(within, |source| matches!(source, Source::Stored { .. }))
    }

    /// Returns the runs of pages that are stored in images above the base.
    pub(crate) fn newer_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(
            0..self.size(),
            |source| matches!(source, Source::Stored { layer, .. } if layer > 0),
        )
    }

    /// Returns the runs of pages that an image says are zeros. The zeros of a full base are in none
    /// of them.
    pub(crate) fn zero_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(0..self.size(), |source| source == Source::Zeroed)
    }

    fn runs(
        &self,
        within: Range<u64>,
        wanted: impl Fn(Source) -> bool,
    ) -> impl Iterator<Item = Range<u64>> {
        let segments = self.segments(within);
        let wanted = segments.filter(move |segment| wanted(segment.source));
        joined(wanted.map(|segment| segment.range))
    }

    pub(crate) fn base(&self) -> &Image {
        &self.layers[0]
    }

    /// The oldest image that has a footer.
    pub(crate) fn oldest_sealed(&self) -> Option<&Image> {
        self.members.sealed.map(|layer| &self.layers[layer])
    }

    fn add(&mut self, newest: Image, pages: Pages) {
        let layer = self.layers.len();
        let zeros_are_clear = layer == 0 && self.full;
        let mut add = |range: Range<u64>, stored: Option<u64>| match stored {
            Some(offset) => self.extents.add(range, Source::Stored { layer, offset }),
            // What no layer has is zeros.
            None if zeros_are_clear => {}
            None => self.extents.add(range, Source::Zeroed),
        };
        match pages {
            Pages::InFooter => {
                let runs = newest.footer.iter().flat_map(|footer| &footer.runs);
                runs.for_each(|run| add(run.range(), run.stored_at(run.start)));
            }
            Pages::Listed(pages) => {
                for Range { start: mut at, end } in pages.into_runs() {
                    while at < end {
                        let (stored, next) = newest.place(at);
                        add(at..next.min(end), stored);
                        at = next;
                    }
                }
            }
        }
        self.members.add(layer, &newest);
        self.layers.push(newest);
    }

    /// Fills `buf` from `offset` on; the error names the image.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        let mut rest = buf;
        for Segment { range, source } in self.segments(offset..offset + rest.len() as u64) {
            let (piece, later) = rest.split_at_mut((range.end - range.start) as usize);
            match source {
                Source::Stored { layer, offset } => self.layers[layer].read_file(offset, piece)?,
                Source::Nowhere if !self.full => return Err(self.not_in_diffs(range.start)),
                Source::Nowhere | Source::Zeroed => piece.fill(0),
            }
            rest = later;
        }
        Ok(())
    }

    fn not_in_diffs(&self, offset: u64) -> ImageError {
        ImageError::NotInDiffs {
            offset: offset - offset % self.page_size,
            oldest: self.base().path.clone(),
        }
    }
}

/// Which pages a layer speaks for.
enum Pages {
    /// Those in the runs of its footer.
    InFooter,
    /// These, wherever its footer says that they are, if it has one.
    Listed(PageSet),
}

/// The guest's RAM, each page from the newest image that holds it.
///
/// Reading a page that no image of a chain of diffs holds fails with [`ImageError::NotInDiffs`].
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

    /// Returns what is stored. Of a chain of diffs it returns all: reading a page that none of them holds then fails, while a page that is left
    /// out would be taken for zeros.
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        if !self.full {
            return Box::new(std::iter::once(range).filter(|range| !range.is_empty()));
        }
        // What lies past the end, a read tells.
        let past = self.size().max(range.start)..range.end;
        let past = std::iter::once(past).filter(|past| !past.is_empty());
        let stored = self.stored_in(range.start..range.end.min(self.size()));
        Box::new(stored.chain(past))
    }
}
