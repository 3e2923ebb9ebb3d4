//! A single memory image: raw, sealed or packed.

mod directory;
mod options;

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image_format::{Footer, FooterError, ImageId, ImageKind, Layout, RAW_UNIT};
use memory_writer::FileVersion;
use page_reader::RamLayout;

pub use options::ImageOptions;

use crate::error::{OpenImageError, ReadImageError};
use crate::image_file::{ImageFile, ImageSource, ReopenError};

/// Bytes that are read, compared or copied at a time.
pub(crate) const READ_SIZE: u64 = 1 << 20;

/// An open memory image. If the image is sealed, its [`Footer`] was read and is consistent.
///
/// Pages are read on demand. [`verify`](Self::verify) checks them.
///
/// # Examples
/// ```
/// use memory_image::Image;
/// # use memory_writer::{Layout, MemoryWriter};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("full.mem");
/// # let options = MemoryWriter::options().layout(Layout::Sealed);
/// # let mut writer = options.open(&path, 1 << 20, 4096)?;
/// # writer.write_full(&vec![1; 1 << 20])?;
/// # writer.commit()?;
///
/// let image = Image::open(&path)?;
/// match image.footer() {
///     Some(footer) => println!("{}, {} bytes present", footer.id, footer.present_bytes()),
///     None => println!("raw, {} bytes of RAM", image.ram_size()),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Image {
    /// The path, or the name of a file or reader without one.
    pub(crate) path: PathBuf,
    has_path: bool,
    source: ImageSource,
    pub(crate) size: u64,
    pub(crate) footer: Option<Footer>,
    /// Metadata of the file at the time of opening, before anything was read.
    opened: Option<Metadata>,
}

impl Image {
    /// Opens the sealed or packed image at `path`.
    ///
    /// # Errors
    /// Returns an [`OpenImageError`]. [`OpenImageError::Footer`] includes an image of version 1
    /// whose length is a multiple of 512, because it may also be raw: pass its format to
    /// [`open_as`](Self::open_as).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenImageError> {
        Self::open_file(path.as_ref(), |file| Footer::read(file).map(Some))
    }

    /// Opens the raw image at `path`. The content of the file is not examined, so nothing that a
    /// guest wrote to its RAM affects the result.
    ///
    /// # Errors
    /// Returns an [`OpenImageError`], such as [`NotRaw`](OpenImageError::NotRaw) for an invalid
    /// length.
    ///
    /// # Examples
    /// ```
    /// use memory_image::Image;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("ram");
    /// # std::fs::write(&path, [7; 4096])?;
    ///
    /// assert!(Image::open(&path).is_err()); // it may be a truncated sealed image
    /// assert_eq!(Image::open_raw(&path)?.ram_size(), 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_raw(path: impl AsRef<Path>) -> Result<Self, OpenImageError> {
        Self::open_file(path.as_ref(), |_| Ok(None))?.check_raw()
    }

    /// Opens the image at `path` in the given format.
    ///
    /// # Errors
    /// Returns an [`OpenImageError`], such as [`Footer`](OpenImageError::Footer) for another
    /// format.
    pub fn open_as(path: impl AsRef<Path>, layout: Layout) -> Result<Self, OpenImageError> {
        if !layout.has_footer() {
            return Self::open_raw(path);
        }
        Self::open_file(path.as_ref(), |file| {
            Footer::read_as(file, layout).map(Some)
        })
    }

    fn open_file(
        path: &Path,
        footer: impl FnOnce(&File) -> Result<Option<Footer>, FooterError>,
    ) -> Result<Self, OpenImageError> {
        let path = path.to_owned();
        let failed = |source| OpenImageError::Open {
            path: path.clone(),
            source,
        };
        let file = ImageFile::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(OpenImageError::NotAFile { path });
        }
        if metadata.len() == 0 {
            return Err(OpenImageError::Empty { path });
        }
        let footer = read_footer(&path, || footer(&file))?;
        let source = ImageFile::new(&path, file, &metadata, footer.is_some());
        let source = ImageSource::File(source);
        Ok(Self::new(
            path,
            source,
            footer,
            metadata.len(),
            Some(metadata),
        ))
    }

    /// Creates an image of `len` bytes.
    fn new(
        path: PathBuf,
        source: ImageSource,
        footer: Option<Footer>,
        len: u64,
        opened: Option<Metadata>,
    ) -> Self {
        Self {
            path,
            has_path: true,
            source,
            size: footer.as_ref().map_or(len, |it| it.ram_size),
            footer,
            opened,
        }
    }

    /// Checks that the length of a raw image is one that RAM can have.
    fn check_raw(self) -> Result<Self, OpenImageError> {
        match self.footer.is_some() || self.size.is_multiple_of(RAW_UNIT) {
            true => Ok(self),
            false => Err(OpenImageError::NotRaw {
                path: self.path,
                size: self.size,
            }),
        }
    }

    /// Returns the path that the image was opened at, as errors show it. For an open file or a
    /// reader, returns its [name](ImageOptions::name), which is not a path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of the guest's RAM in bytes. A raw image has the same size.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.size
    }

    /// Returns the layout of its pages.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.footer
            .as_ref()
            .map_or(Layout::Raw, |footer| footer.layout)
    }

    /// Returns its footer, or `None` for a raw image.
    #[must_use]
    pub fn footer(&self) -> Option<&Footer> {
        self.footer.as_ref()
    }

    /// Returns the guest-physical address ranges of the RAM.
    ///
    /// Returns `None` for a raw image, and for an image in pages of less than 4 KiB whose regions
    /// are not [aligned](RamLayout::ALIGNMENT). The [footer](Self::footer) has these too.
    #[must_use]
    pub fn ram_layout(&self) -> Option<RamLayout> {
        let regions = self.footer.as_ref()?.regions.iter();
        RamLayout::new(regions.map(|region| (region.start, region.end - region.start))).ok()
    }

    /// Returns the id of the state that the image represents, or `None` for a raw image.
    #[must_use]
    pub fn id(&self) -> Option<ImageId> {
        self.footer.as_ref().map(|footer| footer.id)
    }

    /// Returns whether the image is known to be a diff. A raw image does not record this.
    #[must_use]
    pub fn is_diff(&self) -> bool {
        self.footer
            .as_ref()
            .is_some_and(|footer| footer.kind != ImageKind::Full)
    }

    /// Returns whether present pages are at their guest offsets in the file.
    pub(crate) fn in_place(&self) -> bool {
        self.layout().is_in_place()
    }

    /// Returns the version of its file that was opened, for a writer that may [replace
    /// only](memory_writer::MemoryWriterOptions::replace_only) this version. The value keeps the
    /// file open.
    ///
    /// # Errors
    /// Returns a [`ReadImageError`] if the file was closed to save descriptors and cannot be opened
    /// again, and [`ReadImageError::NoFile`] for a [reader](Self::from_reader), which has no
    /// version.
    pub fn version(&self) -> Result<FileVersion, ReadImageError> {
        match &self.opened {
            Some(opened) => Ok(FileVersion::new(self.file()?, opened)),
            None => Err(self.no_file()),
        }
    }

    /// Checks that the file was not resized or written to since it was opened. Otherwise, bytes
    /// read from it may belong to no single version. A file that was replaced by another one, or
    /// removed, counts as unchanged.
    ///
    /// For a [reader](Self::from_reader), calls its
    /// [`check_source`](page_reader::PageReader::check_source).
    ///
    /// # Errors
    /// Returns a [`ReadImageError`], such as [`Changed`](ReadImageError::Changed).
    pub fn check_unchanged(&self) -> Result<(), ReadImageError> {
        let path = || self.path.clone();
        if let ImageSource::Reader(reader) = &self.source {
            let checked = reader.check_source();
            return checked.map_err(|source| ReadImageError::Source {
                path: path(),
                source,
            });
        }
        match self.version()?.is_current() {
            Ok(true) => Ok(()),
            Ok(false) => Err(ReadImageError::Changed { path: path() }),
            Err(source) => Err(ReadImageError::Reopen {
                path: path(),
                source,
            }),
        }
    }

    /// Returns the [identity](identity_of) of its file.
    pub(crate) fn identity(&self) -> Option<(u64, u64)> {
        self.opened.as_ref().map(identity_of)
    }

    /// Returns whether it was opened by its path.
    pub(crate) fn has_path(&self) -> bool {
        self.has_path
    }

    /// Returns whether its bytes are in a file, not behind a reader.
    pub(crate) fn has_file(&self) -> bool {
        matches!(self.source, ImageSource::File(_))
    }

    /// Returns the file, which is opened again if it was closed to save descriptors.
    pub(crate) fn file(&self) -> Result<Arc<File>, ReadImageError> {
        let path = || self.path.clone();
        let ImageSource::File(file) = &self.source else {
            return Err(self.no_file());
        };
        file.get().map_err(|error| match error {
            ReopenError::Replaced => ReadImageError::Replaced { path: path() },
            ReopenError::Io(source) => ReadImageError::Reopen {
                path: path(),
                source,
            },
        })
    }

    fn no_file(&self) -> ReadImageError {
        ReadImageError::NoFile {
            path: self.path.clone(),
        }
    }

    /// Returns the position in the file of the RAM's bytes from `offset` on, if they are stored,
    /// and the RAM offset at which this state ends.
    pub(crate) fn locate(&self, offset: u64) -> (Option<u64>, u64) {
        let Some(footer) = &self.footer else {
            return (Some(offset), u64::MAX);
        };
        match footer.run_at(offset) {
            Some(run) => (run.stored_at(offset), run.range().end),
            None => (
                None,
                footer.run_after(offset).map_or(self.size, |run| run.start),
            ),
        }
    }

    pub(crate) fn read_file(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadImageError> {
        let read = match &self.source {
            ImageSource::File(_) => self.file()?.read_exact_at(buf, offset),
            ImageSource::Reader(reader) => reader.read_at(offset, buf),
        };
        read.map_err(|source| self.read_error(offset, source))
    }

    pub(crate) fn read_error(&self, offset: u64, source: io::Error) -> ReadImageError {
        ReadImageError::Read {
            path: self.path.clone(),
            offset,
            source,
        }
    }
}

/// Returns the device and inode of a file.
fn identity_of(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Reads the footer of the image that `path` names.
fn read_footer(
    path: &Path,
    read: impl FnOnce() -> Result<Option<Footer>, FooterError>,
) -> Result<Option<Footer>, OpenImageError> {
    let mut footer = read().map_err(|source| OpenImageError::Footer {
        path: path.to_owned(),
        source,
    })?;
    if let Some(footer) = &mut footer {
        // They were grown while they were read, up to twice their size.
        footer.runs.shrink_to_fit();
        footer.checksums.shrink_to_fit();
    }
    Ok(footer)
}
