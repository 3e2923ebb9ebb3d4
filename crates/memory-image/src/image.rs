//! One image: raw, sealed or packed.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image_format::{Footer, FooterError, ImageId, Kind, Placement};

use crate::error::ImageError;
use crate::image_file::{ImageFile, ReopenError};

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
}

impl Image {
    /// Opens the image at `path`; one without a footer is taken for a raw one.
    ///
    /// # Errors
    /// [`ImageError`]: no regular file with bytes in it, or a footer that is damaged or of a later version.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref().to_owned();
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
        let mut footer = Footer::find(&file).map_err(|source| ImageError::Footer {
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
        })
    }

    /// Opens the image at `path`, which must be sealed or packed.
    ///
    /// # Errors
    /// [`ImageError::Footer`] with [`FooterError::NotSealed`] for a raw one; otherwise as [`open`](Self::open).
    pub fn open_sealed(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let image = Self::open(path)?;
        match image.footer {
            Some(_) => Ok(image),
            None => Err(ImageError::Footer {
                path: image.path,
                source: FooterError::NotSealed,
            }),
        }
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the guest's RAM in bytes; a raw image is as large.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.size
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

    pub(crate) fn too_many_pages(&self, page_size: u64) -> ImageError {
        ImageError::TooManyPages {
            path: self.path.clone(),
            size: self.size,
            page_size,
        }
    }
}
