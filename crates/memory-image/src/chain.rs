//! A full image and the diffs taken after it, read as one.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page_reader::PageReader;

use crate::error::ImageError;
use crate::page_set::PageSet;
use crate::raw::RawFile;

/// A full raw image and the diffs taken after it, oldest first: the guest's RAM as it was at the last of them.
///
/// The images are opened and looked through once; their bytes are read when asked for. They must not change while the
/// chain is open. A snapshot that is *replaced* by a commit does no harm: the chain goes on reading the old file.
///
/// Memory: one bit per page and image.
#[derive(Debug)]
pub struct Chain {
    page_size: u64,
    /// The base first. No page is in two layers: the newest that holds it has it.
    layers: Vec<Layer>,
    /// Directories whose holes were found to be worth believing: each is probed once.
    believed: Vec<PathBuf>,
}

#[derive(Debug)]
struct Layer {
    image: RawFile,
    pages: PageSet,
}

impl Chain {
    /// Opens the full image `base`, of a guest whose snapshots are in pages of `page_size` bytes.
    ///
    /// # Errors
    /// [`ImageError`]: no regular file with bytes in it, no whole number of pages, or more of them than there is memory to count.
    pub fn open(base: impl AsRef<Path>, page_size: u64) -> Result<Self, ImageError> {
        if !page_size.is_power_of_two() {
            return Err(ImageError::PageSizeNotPowerOfTwo { page_size });
        }
        let image = RawFile::open(base.as_ref())?;
        if !image.size.is_multiple_of(page_size) {
            return Err(ImageError::NotWholePages {
                path: image.path,
                size: image.size,
                page_size,
            });
        }
        let pages = image.stored_pages(page_size)?;
        Ok(Self {
            page_size,
            layers: vec![Layer { image, pages }],
            believed: Vec::new(),
        })
    }

    /// Adds the raw diff that was taken next. Its pages are what its file system does not report as holes, where it can be believed
    /// (see the [crate's page](crate#how-pages-are-told-from-gaps)).
    ///
    /// # Errors
    /// [`ImageError::UnclearDiff`] where it can't be told which pages the diff holds; [`ImageError::SizeDiffers`] for a diff of
    /// another guest; what [`open`](Self::open) gives. The chain stays as it was.
    pub fn push(&mut self, diff: impl AsRef<Path>) -> Result<(), ImageError> {
        let image = self.open_diff(diff.as_ref())?;
        let pages = image.diff_pages(self.page_size, &mut self.believed)?;
        self.add(Layer { image, pages });
        Ok(())
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
        let image = self.open_diff(diff.as_ref())?;
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

    /// The size of the guest's RAM in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.base().size
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
        self.layers.iter().map(|layer| layer.image.path.as_path())
    }

    /// The runs of pages that are stored in any of the images, ascending, in bytes. Whatever lies between them is zeros.
    pub fn stored_runs(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let (base, diffs) = self.layers.split_at(1);
        let mut stored = base[0].pages.clone();
        diffs.iter().for_each(|layer| stored.unite(&layer.pages));
        stored.into_runs()
    }

    fn base(&self) -> &RawFile {
        &self.layers[0].image
    }

    fn open_diff(&self, path: &Path) -> Result<RawFile, ImageError> {
        let (image, base) = (RawFile::open(path)?, self.base());
        if image.size != base.size {
            let (path, size) = (image.path, image.size);
            return Err(ImageError::SizeDiffers {
                path,
                size,
                base: base.path.clone(),
                base_size: base.size,
            });
        }
        Ok(image)
    }

    fn add(&mut self, newest: Layer) {
        self.layers
            .iter_mut()
            .for_each(|older| older.pages.remove(&newest.pages));
        self.layers.push(newest);
    }

    /// The image that has the page at `offset`, and where its run of pages ends, no later than `end`. `None` is zeros.
    fn owner(&self, offset: u64, end: u64) -> (Option<&RawFile>, u64) {
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
        (owner.map(|layer| &self.layers[layer].image), next.min(end))
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
                Some(image) => {
                    image
                        .file
                        .read_exact_at(piece, at)
                        .map_err(|source| ImageError::Read {
                            path: image.path.clone(),
                            offset: at,
                            source,
                        })?
                }
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
}
