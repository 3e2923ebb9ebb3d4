//! Guest memory that maps images copy-on-write.

mod chain;
mod data;
mod host_writes;
mod plan;
mod region;

use std::io;
use std::ops::Range;
use std::path::Path;

use dirty_bitmap::ParentImage;
use guest_ram::{OwnerBitmap, RamOwner};
use image_format::ImageId;
use page_reader::{HostMemory, PageReader, RamLayout};

pub use chain::{MappedChain, MappedChainOptions};
use host_writes::HostWrites;
pub(crate) use region::{Region, host_page};

use crate::error::{MapError, NotFullError};
use crate::image::Image;

/// A full image, raw or sealed, mapped copy-on-write (`MAP_PRIVATE`): RAM for a guest that starts
/// at once and reads its pages when it touches them. The guest's writes never change the file.
///
/// On tmpfs, touching a page where the file has a hole allocates the page in the file. The file
/// then takes more memory and has fewer holes, with the same content, which does not affect a full
/// image. Do not map a raw diff, which cannot be distinguished from a full image: each touched hole
/// would later be taken for a page of zeros.
///
/// The RAM is one range of host memory in the order of the memory file. For a guest of several
/// regions, use each region from its offset on. The host address of a region is page-aligned if its
/// offset is.
///
/// The file must not be truncated or written to while it is mapped: touching a page past its end
/// raises `SIGBUS`, and a page that was not touched yet changes with the file. A commit may replace
/// the file, because the mapping keeps the old file.
///
/// # Discarded memory
/// **`madvise(MADV_DONTNEED)` on this memory does not make zeros: the bytes of the image return.**
/// A balloon device that discards pages like this corrupts the guest, which expects zeros or its
/// own bytes. Disable the balloon and free page reporting, or let them write zeros:
/// [`write_zeros`](Self::write_zeros), or a method of `GuestRam` that writes and marks. Zeros take
/// memory, so nothing is returned to the host. The crate `lazy-restore` starts a guest as fast, and
/// a balloon may discard its memory.
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
/// println!("a guest of {} bytes at {:p}", ram.ram_size(), ram.as_ptr());
/// let mut byte = [0];
/// ram.read_at(4096, &mut byte)?; // the current byte of a running guest
/// assert_eq!(byte, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the memory is unmapped when this is dropped"]
pub struct MappedImage {
    ram: Region,
    layout: Option<RamLayout>,
    id: Option<ImageId>,
    writes: HostWrites,
}

impl MappedImage {
    /// Maps the full sealed image at `path`, readable and writable.
    ///
    /// # Errors
    /// Returns a [`MapError`], such as [`Packed`](MapError::Packed) for a packed image.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MapError> {
        Self::from_image(Image::open(path)?)
    }

    /// Maps the raw image at `path`, readable and writable.
    ///
    /// # Errors
    /// Returns a [`MapError`].
    pub fn open_raw(path: impl AsRef<Path>) -> Result<Self, MapError> {
        Self::from_image(Image::open_raw(path)?)
    }

    /// Maps an opened image, raw or sealed, readable and writable. Use it for a memfd or another
    /// file without a path: see [`Image::from_file`]. A raw image is treated as full.
    ///
    /// # Errors
    /// Returns a [`MapError`], such as [`ReadImageError::NoFile`](crate::ReadImageError::NoFile)
    /// for an image of [`Image::from_reader`].
    pub fn from_image(image: Image) -> Result<Self, MapError> {
        if image.is_diff() {
            return Err(NotFullError::new(image.path).into());
        }
        if !image.in_place() {
            return Err(MapError::Packed { path: image.path });
        }
        let ram = Region::of_file(&*image.file()?, image.size);
        let ram = ram.map_err(|source| MapError::Map {
            path: image.path.clone(),
            source,
        })?;
        image.check_unchanged()?;
        Ok(Self {
            ram,
            layout: image.ram_layout(),
            id: image.id(),
            writes: HostWrites::default(),
        })
    }

    /// Returns the address of the first byte, aligned to the host's page. It is valid for reads and
    /// writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ram.as_ptr()
    }

    /// Returns the size of the RAM in bytes. For a raw file this is the size when it was mapped.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram.len() as u64
    }

    /// Overwrites these bytes of the RAM with zeros, for a balloon device, as a write of the guest
    /// would. Threads and vCPUs may access the memory concurrently. Marks the pages afterwards in
    /// the bitmap of a `GuestRam` that has the memory, or takes it later.
    ///
    /// # Errors
    /// Returns [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) if the range ends past the RAM, and
    /// [`OutOfMemory`](io::ErrorKind::OutOfMemory) if the first call can't allocate a bit for each
    /// page. Nothing is written.
    pub fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        write_zeros(&self.ram, &self.writes, range)
    }
}

#[allow(unsafe_code)]
// SAFETY: `host_memory` lends memory of the region, which is mapped readable and writable until the
// value is dropped. No reference to it exists. The documentation requires that the file is not
// truncated.
unsafe impl RamOwner for MappedImage {
    fn image(&self) -> ParentImage {
        ParentImage::of_image(self.id.map(ImageId::to_bytes))
    }

    fn mark_writes(&self, bitmap: OwnerBitmap) {
        self.writes.mark_in(bitmap);
    }
}

/// Overwrites a range of mapped RAM with zeros, and records the write.
fn write_zeros(ram: &Region, writes: &HostWrites, range: Range<u64>) -> io::Result<()> {
    writes
        .prepare(ram.len() as u64)
        .map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
    ram.write_zeros(range.clone())?;
    if !range.is_empty() {
        writes.record(range);
    }
    Ok(())
}

/// Implements [`PageReader`] for RAM that is mapped. It is read as the guest has it now: the images
/// and the guest's writes.
macro_rules! read_mapped_ram {
    ($($mapped:ty),*) => {$(
        /// Reads the RAM as the guest has it now: the images and the guest's writes.
        impl PageReader for $mapped {
            fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
                self.ram.read_at(offset, buf)
            }

            fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
                self.ram.host_memory(offset, len)
            }

            fn ram_layout(&self) -> Option<&RamLayout> {
                self.layout.as_ref()
            }

            fn known_size(&self) -> Option<u64> {
                Some(self.ram_size())
            }
        }
    )*};
}

read_mapped_ram!(MappedImage, MappedChain);
