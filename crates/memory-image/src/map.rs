//! Images as guest memory, without reading them.

mod chain;
mod data;
mod region;

use std::io;
use std::path::Path;

use page_reader::{HostMemory, PageReader};

pub use chain::{MappedChain, MappedChainOptions};
pub(crate) use region::{Region, host_page};

use crate::error::ImageError;
use crate::image::Image;

/// A full image, raw or sealed, mapped copy-on-write (`MAP_PRIVATE`): RAM for a guest that starts at once and reads its pages when it touches
/// them. What the guest writes stays its own; the bytes of the file never change.
///
/// On tmpfs, a page that is touched where the file has a hole is allocated in the file, which then takes more memory and has fewer
/// holes, of the same bytes. That does a full image no harm. Do not map a raw diff, which nothing tells from a full image: each of its holes
/// that is touched would be taken for a page of zeros later.
///
/// The RAM is one range of host memory in the order of the memory file. A guest of several regions takes each
/// region from its offset on; the file's offsets and so the host's addresses are page-aligned where the regions are.
///
/// The file must not be cut short while it is mapped: touching a page that is gone is a `SIGBUS`. Replacing it by a commit is no
/// harm, because the mapping keeps the old file.
///
/// # Examples
/// ```
/// use memory_image::MappedImage;
/// use page_reader::PageReader;
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("full.mem");
/// # std::fs::write(&path, vec![7; 1 << 20])?;
///
/// let ram = MappedImage::open_raw(&path)?;
/// println!("a guest of {} bytes at {:p}", ram.len(), ram.as_ptr());
/// let mut byte = [0];
/// ram.read_at(4096, &mut byte)?; // what a running guest has there now
/// assert_eq!(byte, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MappedImage {
    ram: Region,
}

impl MappedImage {
    /// Maps the full sealed image at `path`, readable and writable.
    ///
    /// # Errors
    /// [`ImageError::NotFull`] for a diff, [`ImageError::Packed`] for an image whose pages are not at their offsets, [`ImageError::Map`],
    /// and what [`Image::open`] gives.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        Self::of(Image::open(path)?)
    }

    /// Maps the raw image at `path`, readable and writable.
    ///
    /// # Errors
    /// [`ImageError::Map`], and what [`Image::open_raw`] gives.
    pub fn open_raw(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        Self::of(Image::open_raw(path)?)
    }

    fn of(image: Image) -> Result<Self, ImageError> {
        if image.is_diff() {
            return Err(ImageError::NotFull { path: image.path });
        }
        if !image.in_place() {
            return Err(ImageError::Packed { path: image.path });
        }
        let ram = Region::of_file(&*image.file()?, image.size);
        let ram = ram.map_err(|source| ImageError::Map {
            path: image.path,
            source,
        })?;
        Ok(Self { ram })
    }

    /// The address of the first byte, aligned to the host's page. Valid for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ram.as_ptr()
    }

    /// The size of the RAM in bytes: a raw file's when it was mapped.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.ram.len()
    }
}

/// The RAM as the guest has it now: the image, and what was written since.
impl PageReader for MappedImage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.ram.read_at(offset, buf)
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        self.ram.host_memory(offset, len)
    }
}
