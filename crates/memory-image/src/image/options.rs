//! Images that are not opened by a path.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use image_format::{Footer, FooterError, Layout};
use nix::errno::Errno;
use page_reader::PageReader;

use super::{Image, read_footer};
use crate::error::OpenImageError;
use crate::image_file::{ImageFile, ImageSource};

/// Options for an image that is not opened by a path, created by [`Image::options`].
///
/// # Examples
/// ```
/// use memory_image::{Image, Layout};
/// use memory_image::memory_writer::PackedStream;
///
/// let mut stream = PackedStream::new(Vec::new(), 1 << 20, 4096)?;
/// stream.write_full(&vec![7; 1 << 20])?;
/// let bytes = stream.finish()?; // received from a socket, say
///
/// let len = bytes.len() as u64;
/// let options = Image::options().layout(Layout::Packed).name("received");
/// let image = options.open_reader(bytes, len)?;
/// assert_eq!(image.ram_size(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `open_file` or `open_reader`"]
pub struct ImageOptions {
    layout: Option<Layout>,
    name: Option<PathBuf>,
}

impl Image {
    /// Returns a builder for the format and the name of an image that is not opened by a path. An
    /// image at a path is opened by [`open`](Self::open), [`open_raw`](Self::open_raw) or
    /// [`open_as`](Self::open_as).
    pub fn options() -> ImageOptions {
        ImageOptions::default()
    }

    /// Opens a sealed or packed image in an open file, such as a memfd, an unlinked file or an
    /// inherited descriptor. See [`ImageOptions::open_file`].
    ///
    /// # Errors
    /// Returns the errors of [`ImageOptions::open_file`].
    pub fn from_file(file: File) -> Result<Self, OpenImageError> {
        Self::options().open_file(file)
    }

    /// Opens a sealed or packed image of `len` bytes that `reader` reads. See
    /// [`ImageOptions::open_reader`].
    ///
    /// # Errors
    /// Returns the errors of [`ImageOptions::open_reader`].
    pub fn from_reader(
        reader: impl PageReader + Send + Sync + 'static,
        len: u64,
    ) -> Result<Self, OpenImageError> {
        Self::options().open_reader(reader, len)
    }
}

impl ImageOptions {
    /// Sets the format of the image. [`Layout::Raw`] opens a raw image, as [`Image::open_raw`]
    /// does. The default is that of the footer, sealed or packed.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Sets the name of the image in errors, which [`Image::path`] returns. The default is `(open
    /// file)` or `(reader)`.
    pub fn name(mut self, name: impl Into<PathBuf>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Opens the image in an open file, from its first byte. The position of the file is neither
    /// used nor changed.
    ///
    /// The file stays open as long as the image: it does not count to the [limit of
    /// descriptors](crate::Chain#many-images). Otherwise the image is like one that was opened by a
    /// path: it can be mapped, and changes of the file are detected. The pages of a raw diff are
    /// derived from its holes only if the file has a name, on Linux: pass them to
    /// [`Chain::push_image_pages`](crate::Chain::push_image_pages) otherwise.
    ///
    /// # Errors
    /// Returns an [`OpenImageError`]: [`NotSeekable`](OpenImageError::NotSeekable) for a pipe, a
    /// socket or a directory, [`WriteOnly`](OpenImageError::WriteOnly) for a file that is not open
    /// for reading, or the errors of [`Image::open_as`].
    pub fn open_file(&self, file: File) -> Result<Image, OpenImageError> {
        let path = self.name_or("(open file)");
        let failed = |source| OpenImageError::Open {
            path: path.clone(),
            source,
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(OpenImageError::NotSeekable { path });
        }
        match file.read_exact_at(&mut [0], 0) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::EBADF as i32) => {
                return Err(OpenImageError::WriteOnly { path });
            }
            Err(_) if metadata.len() == 0 => return Err(OpenImageError::Empty { path }),
            Err(error) => return Err(failed(error)),
        }
        let len = metadata.len();
        let footer = read_footer(&path, || {
            self.footer(len, |buf, offset| file.read_exact_at(buf, offset))
        })?;
        let source = ImageFile::held(&path, file, &metadata, footer.is_some());
        let source = ImageSource::File(source);
        let image = Image::new(path, source, footer, len, Some(metadata));
        image.without_path().check_raw()
    }

    /// Opens the image of `len` bytes that `reader` reads: bytes in memory, or any positioned
    /// reader.
    ///
    /// The offsets that are passed to the reader are offsets in the image file. Only in a raw image
    /// are they also offsets in the RAM. The bytes must not change while the image is in use; see
    /// [`Image::check_unchanged`]. Such an image cannot be mapped. The pages of a raw diff are
    /// passed to [`Chain::push_image_pages`](crate::Chain::push_image_pages), because a reader has
    /// no holes.
    ///
    /// # Errors
    /// Returns an [`OpenImageError`], such as [`Open`](OpenImageError::Open) if the reader ends
    /// before `len`, or the errors of [`Image::open_as`].
    pub fn open_reader(
        &self,
        reader: impl PageReader + Send + Sync + 'static,
        len: u64,
    ) -> Result<Image, OpenImageError> {
        let path = self.name_or("(reader)");
        if len == 0 {
            return Err(OpenImageError::Empty { path });
        }
        // Without a footer at the end, nothing else shows that the reader has these bytes.
        let last = reader.read_at(len - 1, &mut [0]);
        last.map_err(|source| OpenImageError::Open {
            path: path.clone(),
            source,
        })?;
        let footer = read_footer(&path, || {
            self.footer(len, |buf, offset| reader.read_at(offset, buf))
        })?;
        let source = ImageSource::Reader(Box::new(reader));
        let image = Image::new(path, source, footer, len, None);
        image.without_path().check_raw()
    }

    fn name_or(&self, default: &str) -> PathBuf {
        self.name.clone().unwrap_or_else(|| default.into())
    }

    /// Reads the footer of an image of `len` bytes, if its format has one.
    fn footer(
        &self,
        len: u64,
        read_at: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> Result<Option<Footer>, FooterError> {
        match self.layout {
            Some(layout) if !layout.has_footer() => Ok(None),
            layout => Footer::read_from(len, layout, read_at).map(Some),
        }
    }
}

impl Image {
    fn without_path(mut self) -> Self {
        self.has_path = false;
        self
    }
}
