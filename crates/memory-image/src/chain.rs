//! Chains: a full image and the diffs taken after it, read as one image.

mod extents;
mod open;
pub(crate) mod segment;
mod segments;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::Path;

use dirty_bitmap::coalesce;
use image_format::ImageId;
use page_reader::{PageReader, PopulatedRanges, RamLayout};
use sparse_file::PageHoles;

use crate::error::ReadImageError;
use crate::image::Image;
use extents::ExtentMap;
use segment::{Segment, SegmentSource};

/// A full image and the diffs taken after it, oldest first, read as one image of the guest's RAM at
/// the last snapshot.
///
/// A chain may also consist of diffs alone, to be merged into one diff.
///
/// A chain of diffs alone holds only the pages in its diffs ([`covered_runs`](Self::covered_runs)).
/// Reading any other page is [`ReadImageError::NotInDiffs`]: the page was clean, and its bytes are
/// in an older image.
///
/// The images are opened and indexed once. Their bytes are read on demand. The files must not
/// change while the chain is open. [`restore`](Self::restore), [`merge`](Self::merge),
/// [`compare`](crate::compare()) and [`MappedChain`](crate::MappedChain) fail if an image was
/// resized or written to since it was opened: see [`check_unchanged`](Self::check_unchanged). A
/// caller of [`read`](Self::read) calls that itself.
///
/// The chain checks that sealed images follow each other: a diff whose parent is not the id of the
/// image below it is refused. The chain does not verify checksums: [`Image::verify`] does.
///
/// An id identifies a state, so it may occur more than once: a diff that leads back to an older
/// state has the id of that state. The chain refuses the same file twice, and an image whose id is
/// in the chain and whose parent is not the newest image.
///
/// # Many images
/// A chain may have any number of images. The time to open one more image, and to read a byte,
/// grows with the logarithm of their number.
///
/// Memory: at most 64 bytes for each run of pages that is contiguous in one image's file and in no
/// newer image, and the size of each [`Image`]: about 1,000 bytes, and for a sealed image its
/// footer. Memory use does not grow with the size of the RAM.
///
/// Descriptors: this process keeps at most a quarter of its descriptor limit (`RLIMIT_NOFILE`) open
/// for images. While all images fit, a file may be replaced by a commit, or removed: the chain
/// continues to read the old file. Beyond the limit the file that was opened first is closed. It is
/// opened again by its absolute path when it is read. If the path leads to another file by then, or
/// the file was written to, the read fails with [`ReadImageError::Replaced`]. It never returns
/// other bytes. Leave the images of a long chain in place while the chain is in use,
/// [merge](Self::merge) the chain, or raise the limit before opening it. This matters most in a
/// process that drops the permission to open files. An image that cannot be found by its path (a
/// memfd, an unlinked file) stays open, and so does one of [`Image::from_file`].
///
/// Images need not be files: [`from_image`](Self::from_image), [`push_image`](Self::push_image) and
/// [`push_image_pages`](Self::push_image_pages) take those of [`Image::from_file`] and
/// [`Image::from_reader`].
///
/// Threads: the type is `Send` and `Sync`. Several threads may read and restore one chain at the
/// same time.
#[derive(Debug)]
pub struct Chain {
    page_size: u64,
    full: bool,
    /// Oldest first.
    pub(crate) layers: Vec<Image>,
    /// The location of every page of the RAM, except the zeros of a full base.
    extents: ExtentMap,
    pub(crate) members: Members,
    /// The guest-physical ranges of the RAM, if an image records them.
    ram_layout: Option<RamLayout>,
    /// Cached probe results about the file systems of raw diffs.
    holes: PageHoles,
}

/// Identities of a chain's images, to which a new image is compared.
#[derive(Debug, Default)]
pub(crate) struct Members {
    ids: BTreeSet<ImageId>,
    /// Pairs of device and inode.
    files: BTreeSet<(u64, u64)>,
    /// The oldest layer that has a footer.
    sealed: Option<usize>,
}

impl Members {
    pub(crate) fn has_file_of(&self, image: &Image) -> bool {
        let identity = image.identity();
        identity.is_some_and(|identity| self.files.contains(&identity))
    }

    pub(crate) fn has_id_of(&self, image: &Image) -> bool {
        image.id().is_some_and(|id| self.ids.contains(&id))
    }

    fn add(&mut self, layer: usize, image: &Image) {
        self.ids.extend(image.id());
        self.files.extend(image.identity());
        if image.footer().is_some() {
            self.sealed.get_or_insert(layer);
        }
    }
}

impl Chain {
    /// Returns the size of the guest's RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.base().size
    }

    /// Returns whether the chain has a full base, and so holds all of the RAM.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// Returns the id of the state that the chain represents: the id of its newest image, if that
    /// image is sealed.
    #[must_use]
    pub fn id(&self) -> Option<ImageId> {
        self.layers.last().and_then(Image::id)
    }

    /// Returns the metadata of the state that the chain represents: that of its newest image.
    ///
    /// Returns `None` if that image is raw. The metadata of an older image describes an older
    /// state.
    #[must_use]
    pub fn metadata(&self) -> Option<&[u8]> {
        let footer = self.layers.last().and_then(Image::footer);
        footer.map(|footer| &footer.metadata[..])
    }

    /// Returns the guest-physical address ranges of the RAM: those of any sealed or packed image,
    /// which all have the same.
    ///
    /// Returns `None` if all images are raw, and where [`Image::ram_layout`] does.
    #[must_use]
    pub fn ram_layout(&self) -> Option<&RamLayout> {
        self.ram_layout.as_ref()
    }

    /// Returns the page size of the chain in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Returns the number of images, including the base.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there is always a base")]
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Returns the [paths](Image::path) of the images, the base first.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().map(Image::path)
    }

    /// Returns the images, the base first.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.layers.iter()
    }

    /// Returns the ids of the images, oldest first. Raw images have none.
    ///
    /// A diff on top of the chain needs all of them: pass them to
    /// [`Seal::ancestors`](memory_writer::Seal::ancestors), so that it replaces none.
    ///
    /// # Examples
    /// ```
    /// use memory_image::Chain;
    /// use memory_writer::{Layout, MemoryWriter, Seal, SnapshotError};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let paths = ["full", "diff"].map(|name| dir.path().join(name));
    /// # let options = MemoryWriter::options().layout(Layout::Packed);
    /// # let mut writer = options.clone().open(&paths[0], 1 << 20, 4096)?;
    /// # writer.write_full(&vec![1; 1 << 20])?;
    /// # let parent = writer.image_id().unwrap();
    /// # writer.commit()?;
    /// # let seal = Seal::new().parent(parent);
    /// # let mut writer = options.clone().seal(seal).open(&paths[1], 1 << 20, 4096)?;
    /// # writer.write_runs(&vec![2; 1 << 20], || std::iter::once(0..4096))?;
    /// # writer.commit()?;
    /// let chain = Chain::open_sealed(&paths)?; // a full image and a diff
    /// let newest = chain.id().expect("it is packed");
    /// let seal = Seal::new().parent(newest).ancestors(chain.ids());
    /// let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
    /// let refused = options.open(&paths[0], 1 << 20, 4096).unwrap_err();
    /// assert!(matches!(refused, SnapshotError::ReplacesParent { .. }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn ids(&self) -> impl Iterator<Item = ImageId> {
        self.images().filter_map(Image::id)
    }

    /// Returns the runs of pages that any of the images covers, ascending, in bytes. The gaps
    /// between them are zeros. In a chain of diffs, the gaps are clean pages.
    pub fn covered_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(0..self.ram_size(), |source| source != SegmentSource::Hole)
    }

    /// Returns the runs of pages that are stored in any of the images, ascending, in bytes. The
    /// gaps between them are zeros. In a chain of diffs, the gaps may also be clean pages.
    pub fn stored_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.stored_in(0..self.ram_size())
    }

    fn stored_in(&self, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        self.runs(within, |source| {
            matches!(source, SegmentSource::Stored { .. })
        })
    }

    /// Returns the runs of pages that are stored in images above the base.
    pub(crate) fn newer_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(
            0..self.ram_size(),
            |source| matches!(source, SegmentSource::Stored { layer, .. } if layer > 0),
        )
    }

    /// Returns the runs of pages that an image records as zeros. They do not include the zeros of a
    /// full base.
    pub(crate) fn zero_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs(0..self.ram_size(), |source| source == SegmentSource::Zero)
    }

    fn runs(
        &self,
        within: Range<u64>,
        wanted: impl Fn(SegmentSource) -> bool,
    ) -> impl Iterator<Item = Range<u64>> {
        let segments = self.segments(within);
        let wanted = segments.filter(move |segment| wanted(segment.source));
        coalesce(wanted.map(|segment| segment.range))
    }

    pub(crate) fn base(&self) -> &Image {
        &self.layers[0]
    }

    /// Returns the oldest image that has a footer.
    pub(crate) fn oldest_sealed(&self) -> Option<&Image> {
        self.members.sealed.map(|layer| &self.layers[layer])
    }

    /// Reads the bytes from `offset` on into `buf`, as [`read_at`](PageReader::read_at) does, with
    /// an error that names the image.
    ///
    /// This does not detect that an image was written to. Call
    /// [`check_unchanged`](Self::check_unchanged) after the last read.
    ///
    /// # Errors
    /// Returns a [`ReadImageError`].
    ///
    /// # Panics
    /// Panics if the range is not inside the RAM.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadImageError> {
        let left = self.ram_size().checked_sub(offset);
        assert!(
            left.is_some_and(|left| left >= buf.len() as u64),
            "the range is inside the RAM"
        );
        let mut rest = buf;
        for Segment { range, source } in self.segments(offset..offset + rest.len() as u64) {
            let (piece, later) = rest.split_at_mut((range.end - range.start) as usize);
            match source {
                SegmentSource::Stored { layer, offset } => {
                    self.layers[layer].read_file(offset, piece)?
                }
                SegmentSource::Hole if !self.full => return Err(self.not_in_diffs(range.start)),
                SegmentSource::Hole | SegmentSource::Zero => piece.fill(0),
            }
            rest = later;
        }
        Ok(())
    }

    fn not_in_diffs(&self, offset: u64) -> ReadImageError {
        ReadImageError::NotInDiffs {
            offset: offset - offset % self.page_size,
            oldest: self.base().path.clone(),
        }
    }
}

/// Reads the guest's RAM, each page from the newest image that holds it.
///
/// Reading a page that is in no image of a chain of diffs fails with
/// [`ReadImageError::NotInDiffs`].
impl PageReader for Chain {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = offset
            .checked_add(buf.len() as u64)
            .is_some_and(|end| end <= self.ram_size());
        if !inside {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(offset, buf).map_err(|error| match error {
            ReadImageError::Read { ref source, .. } => io::Error::new(source.kind(), error),
            other => io::Error::other(other),
        })
    }

    /// Returns the stored runs. For a chain of diffs it returns the whole range: reading a page
    /// that none of them holds fails, while an omitted page would be taken for zeros.
    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        if !self.full {
            return Box::new(std::iter::once(range).filter(|range| !range.is_empty()));
        }
        // Included, so that reading past the end reports the error.
        let past = self.ram_size().max(range.start)..range.end;
        let past = std::iter::once(past).filter(|past| !past.is_empty());
        let stored = self.stored_in(range.start..range.end.min(self.ram_size()));
        Box::new(stored.chain(past))
    }

    fn check_source(&self) -> io::Result<()> {
        self.check_unchanged().map_err(io::Error::other)
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.ram_size())
    }
}
