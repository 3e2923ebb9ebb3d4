//! A full image as guest memory, without reading it.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use page_reader::{HostMemory, PageReader};

use crate::error::ImageError;
use crate::image::Image;

/// A full image, raw or sealed, mapped copy-on-write (`MAP_PRIVATE`): RAM for a guest that starts at once and reads its pages when it touches
/// them. What the guest writes stays its own; the file never changes.
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
/// let ram = MappedImage::open(&path)?;
/// println!("a guest of {} bytes at {:p}", ram.len(), ram.as_ptr());
/// let mut byte = [0];
/// ram.read_at(4096, &mut byte)?; // what a running guest has there now
/// assert_eq!(byte, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MappedImage {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to no thread; `munmap` may be called from any.
unsafe impl Send for MappedImage {}
// SAFETY: through `&self` an address is handed out and bytes are copied by `HostMemory::copy_to`, which bears any concurrent writer.
unsafe impl Sync for MappedImage {}

impl MappedImage {
    /// Maps the full image at `path`, readable and writable.
    ///
    /// # Errors
    /// [`ImageError::NotFull`] for a diff, [`ImageError::Packed`] for an image whose pages are not at their offsets, [`ImageError::Map`],
    /// and what [`Image::open`] gives.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let image = Image::open(path)?;
        if image.is_diff() {
            return Err(ImageError::NotFull { path: image.path });
        }
        if !image.in_place() {
            return Err(ImageError::Packed { path: image.path });
        }
        let failed = |source| ImageError::Map {
            path: image.path.clone(),
            source,
        };
        let len = usize::try_from(image.size).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        // Private pages are reserved when they are written: a guest rarely writes all of its RAM.
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: no address is asked for, so the kernel picks a range that nothing else uses.
        let start = unsafe {
            mmap(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
                &image.file,
                0,
            )
        }
        .map_err(|errno| failed(errno.into()))?;
        Ok(Self { start, len })
    }

    /// The address of the first byte, aligned to the host's page. Valid for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// The size of the RAM in bytes: a raw file's when it was mapped.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len.get()
    }

    fn memory(&self, offset: u64) -> Option<HostMemory<'_>> {
        // SAFETY: the mapping is readable from `start` on for `len` bytes, and stays until `self` drops.
        let all = unsafe { HostMemory::new(self.as_ptr(), self.len()) };
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| *start <= self.len())?;
        Some(all.slice(start..self.len()))
    }
}

impl Drop for MappedImage {
    fn drop(&mut self) {
        // SAFETY: exactly what `mmap` returned; borrows of it ended with `self`. Failing would take an address that is not page-aligned.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

/// The RAM as the guest has it now: the image, and what was written since.
impl PageReader for MappedImage {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let memory = self
            .memory(offset)
            .filter(|memory| memory.len() >= buf.len());
        let memory = memory.ok_or(io::ErrorKind::UnexpectedEof)?;
        memory.slice(0..buf.len()).copy_to(buf);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let memory = self.memory(offset)?;
        let memory = memory.slice(0..len.min(memory.len()));
        Some(memory).filter(|memory| !memory.is_empty())
    }
}
