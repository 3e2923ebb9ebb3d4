//! One image: raw, sealed or packed.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image_format::{Footer, FooterError, ImageId, Kind, Placement, RAW_UNIT};
use memory_writer::FileVersion;

use crate::error::ImageError;
use crate::image_file::{ImageFile, ReopenError};

/// How the pages stand in an image's file, as the caller says.
///
/// A raw image says nothing of itself, and all of its bytes are the guest's: what looks like a footer at its end may be one that the guest wrote. So a
/// file is taken for a raw image only where the caller says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Pages at their guest offsets, and nothing else.
    Raw,
    /// The same, and a footer.
    Sealed,
    /// A header, pages one after another, and a footer.
    Packed,
}

/// A memory image that was opened and, if it is sealed, whose [`Footer`] was read and found consistent. Its pages are read when they are asked
/// for, and checked by [`verify`](Self::verify).
///
/// # Examples
/// ```
/// use memory_image::Image;
/// # use memory_writer::{Layout, MemoryWriter, Seal};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("full.mem");
/// # let mut writer = MemoryWriter::options().layout(Layout::Sealed(Seal::new())).open(&path, 1 << 20, 4096)?;
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
    /// Device and inode.
    pub(crate) identity: (u64, u64),
    /// When it was opened, before anything was read.
    opened: Metadata,
}

impl Image {
    /// Opens the image at `path`, which is sealed or packed.
    ///
    /// # Errors
    /// [`ImageError`]: no regular file with bytes in it; [`ImageError::Footer`] for one that is neither, is cut off, damaged or of a later version, or
    /// may as well be raw (one of version 1 whose length is a multiple of 512: name its format to [`open_as`](Self::open_as)).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        Self::open_file(path.as_ref(), |file| Footer::read(file).map(Some))
    }

    /// Opens the raw image at `path`. Nothing that the file holds is looked at, so nothing that a guest wrote to its RAM matters.
    ///
    /// # Errors
    /// [`ImageError`]: no regular file with bytes in it; [`ImageError::NotRaw`] for a length that no raw image has.
    ///
    /// # Examples
    /// ```
    /// use memory_image::Image;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("ram");
    /// # std::fs::write(&path, [7; 4096])?;
    ///
    /// assert!(Image::open(&path).is_err()); // it may be a sealed one that was cut off
    /// assert_eq!(Image::open_raw(&path)?.ram_size(), 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_raw(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        Self::open_file(path.as_ref(), |_| Ok(None)).and_then(|image| {
            match image.size.is_multiple_of(RAW_UNIT) {
                true => Ok(image),
                false => Err(ImageError::NotRaw {
                    path: image.path,
                    size: image.size,
                }),
            }
        })
    }

    /// Opens the image at `path`, which is of this format.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`open_raw`](Self::open_raw); [`ImageError::Footer`] for an image of another format.
    pub fn open_as(path: impl AsRef<Path>, format: Format) -> Result<Self, ImageError> {
        let placement = match format {
            Format::Raw => return Self::open_raw(path),
            Format::Sealed => Placement::InPlace,
            Format::Packed => Placement::Packed,
        };
        Self::open_file(path.as_ref(), |file| {
            Footer::read_as(file, placement).map(Some)
        })
    }

    fn open_file(
        path: &Path,
        footer: impl FnOnce(&File) -> Result<Option<Footer>, FooterError>,
    ) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let failed = |source| ImageError::Open {
            path: path.clone(),
            source,
        };
        let file = ImageFile::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(ImageError::NotAFile { path });
        }
        if metadata.len() == 0 {
            return Err(ImageError::Empty { path });
        }
        let mut footer = footer(&file).map_err(|source| ImageError::Footer {
            path: path.clone(),
            source,
        })?;
        if let Some(footer) = &mut footer {
            // They were grown as they were read, to up to twice their size.
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

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory that its file is in, also where it was opened by a link from another one.
    ///
    /// # Errors
    /// [`ImageError::Open`]: the path leads nowhere any more.
    pub fn directory(&self) -> Result<PathBuf, ImageError> {
        let path = match fs::canonicalize(&self.path) {
            // The working directory may be deeper than an absolute path can name.
            Err(error) if is_too_long(&error) && !self.path.is_symlink() => self.path.clone(),
            found => found.map_err(|source| ImageError::Open {
                path: self.path.clone(),
                source,
            })?,
        };
        Ok(match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        })
    }

    /// The size of the guest's RAM in bytes; a raw image is as large.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.size
    }

    /// How its pages stand in its file.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.footer.as_ref().map(|footer| footer.placement) {
            None => Format::Raw,
            Some(Placement::InPlace) => Format::Sealed,
            Some(Placement::Packed) => Format::Packed,
        }
    }

    /// What its footer says; `None` for a raw image.
    #[must_use]
    pub fn footer(&self) -> Option<&Footer> {
        self.footer.as_ref()
    }

    /// The id of the state that it stands for; `None` for a raw image.
    #[must_use]
    pub fn id(&self) -> Option<ImageId> {
        self.footer.as_ref().map(|footer| footer.id)
    }

    /// Whether it is known to be a diff: a raw one doesn't say.
    #[must_use]
    pub fn is_diff(&self) -> bool {
        self.footer
            .as_ref()
            .is_some_and(|footer| footer.kind != Kind::Full)
    }

    /// Whether the first bytes of the file are the RAM's, as far as they are present.
    pub(crate) fn in_place(&self) -> bool {
        self.footer
            .as_ref()
            .is_none_or(|footer| footer.placement == Placement::InPlace)
    }

    /// Returns the version of its file that was opened, for a writer that is to
    /// [replace only](memory_writer::Options::replace_only) that. Keeps the file open.
    ///
    /// # Errors
    /// [`ImageError::Replaced`], or [`ImageError::Open`]: the file was closed meanwhile, and can't be opened again.
    pub fn version(&self) -> Result<FileVersion, ImageError> {
        Ok(FileVersion::new(self.file()?, &self.opened))
    }

    /// Fails if its file was resized or written to since it was opened: what was read of it may be neither what it was
    /// nor what it is. A file that was replaced by another one, or removed, is as it was.
    ///
    /// # Errors
    /// [`ImageError::Changed`]; otherwise as [`version`](Self::version).
    pub fn check_unchanged(&self) -> Result<(), ImageError> {
        let path = || self.path.clone();
        match self.version()?.is_current() {
            Ok(true) => Ok(()),
            Ok(false) => Err(ImageError::Changed { path: path() }),
            Err(source) => Err(ImageError::Open {
                path: path(),
                source,
            }),
        }
    }

    /// Returns the file, which may have been closed meanwhile and is opened again then.
    ///
    /// # Errors
    /// [`ImageError::Replaced`], or [`ImageError::Open`].
    pub(crate) fn file(&self) -> Result<Arc<File>, ImageError> {
        let path = || self.path.clone();
        self.file.get().map_err(|error| match error {
            ReopenError::Replaced => ImageError::Replaced { path: path() },
            ReopenError::Io(source) => ImageError::Open {
                path: path(),
                source,
            },
        })
    }

    /// Where in the file the RAM's bytes from `offset` on are, if they are there, and up to which offset in RAM that goes on.
    pub(crate) fn place(&self, offset: u64) -> (Option<u64>, u64) {
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

    pub(crate) fn read_file(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImageError> {
        self.file()?
            .read_exact_at(buf, offset)
            .map_err(|source| self.read_error(offset, source))
    }

    pub(crate) fn read_error(&self, offset: u64, source: io::Error) -> ImageError {
        ImageError::Read {
            path: self.path.clone(),
            offset,
            source,
        }
    }
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::ENAMETOOLONG as i32)
}
