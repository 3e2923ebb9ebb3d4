//! A single memory image: raw, sealed or packed.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image_format::{Footer, FooterError, ImageId, ImageKind, Layout, RAW_UNIT};
use memory_writer::FileVersion;

use crate::error::{OpenImageError, ReadImageError};
use crate::image_file::{ImageFile, ReopenError};

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
    pub(crate) path: PathBuf,
    file: ImageFile,
    pub(crate) size: u64,
    pub(crate) footer: Option<Footer>,
    /// Device and inode of the file.
    pub(crate) identity: (u64, u64),
    /// Metadata at the time of opening, before anything was read.
    opened: Metadata,
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
        Self::open_file(path.as_ref(), |_| Ok(None)).and_then(|image| {
            match image.size.is_multiple_of(RAW_UNIT) {
                true => Ok(image),
                false => Err(OpenImageError::NotRaw {
                    path: image.path,
                    size: image.size,
                }),
            }
        })
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
        let mut footer = footer(&file).map_err(|source| OpenImageError::Footer {
            path: path.clone(),
            source,
        })?;
        if let Some(footer) = &mut footer {
            // They were grown while they were read, up to twice their size.
            footer.runs.shrink_to_fit();
            footer.checksums.shrink_to_fit();
        }
        let size = footer.as_ref().map_or(metadata.len(), |it| it.ram_size);
        let identity = (metadata.dev(), metadata.ino());
        Ok(Self {
            file: ImageFile::new(&path, file, &metadata, footer.is_some()),
            path,
            size,
            footer,
            identity,
            opened: metadata,
        })
    }

    /// Returns the path that the image was opened at.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of its file, also if the image was opened by a link in another
    /// directory.
    ///
    /// # Errors
    /// Returns [`OpenImageError::Open`] if the path does not exist any more.
    pub fn directory(&self) -> Result<PathBuf, OpenImageError> {
        let path = match fs::canonicalize(&self.path) {
            // The working directory may be nested deeper than an absolute path can express.
            Err(error) if is_too_long(&error) && !self.path.is_symlink() => self.path.clone(),
            found => found.map_err(|source| OpenImageError::Open {
                path: self.path.clone(),
                source,
            })?,
        };
        Ok(match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        })
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
    /// again.
    pub fn version(&self) -> Result<FileVersion, ReadImageError> {
        Ok(FileVersion::new(self.file()?, &self.opened))
    }

    /// Checks that the file was not resized or written to since it was opened. Otherwise, bytes
    /// read from it may belong to no single version. A file that was replaced by another one, or
    /// removed, counts as unchanged.
    ///
    /// # Errors
    /// Returns a [`ReadImageError`], such as [`Changed`](ReadImageError::Changed).
    pub fn check_unchanged(&self) -> Result<(), ReadImageError> {
        let path = || self.path.clone();
        match self.version()?.is_current() {
            Ok(true) => Ok(()),
            Ok(false) => Err(ReadImageError::Changed { path: path() }),
            Err(source) => Err(ReadImageError::Reopen {
                path: path(),
                source,
            }),
        }
    }

    /// Returns the file, which is opened again if it was closed to save descriptors.
    pub(crate) fn file(&self) -> Result<Arc<File>, ReadImageError> {
        let path = || self.path.clone();
        self.file.get().map_err(|error| match error {
            ReopenError::Replaced => ReadImageError::Replaced { path: path() },
            ReopenError::Io(source) => ReadImageError::Reopen {
                path: path(),
                source,
            },
        })
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
        self.file()?
            .read_exact_at(buf, offset)
            .map_err(|source| self.read_error(offset, source))
    }

    pub(crate) fn read_error(&self, offset: u64, source: io::Error) -> ReadImageError {
        ReadImageError::Read {
            path: self.path.clone(),
            offset,
            source,
        }
    }
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::ENAMETOOLONG as i32)
}
