//! Guest memory that maps a chain copy-on-write.

use std::io;
use std::ops::{ControlFlow, Range};

use dirty_bitmap::ParentImage;
use guest_ram::{OwnerBitmap, RamOwner};
use image_format::ImageId;
use page_reader::RamLayout;
use sparse_file::{Progress, ProgressFn};

use super::host_writes::HostWrites;
use super::plan::{Copy, Plan, len};
use super::{Region, host_page, write_zeros};
use crate::chain::Chain;
use crate::error::MapError;
use crate::image::READ_SIZE;
use crate::restore::{HostRam, RamTarget};
use crate::trace;

/// A chain mapped copy-on-write (`MAP_PRIVATE`) as one range of host memory: RAM for a guest that
/// starts at once and reads its pages when it touches them. The guest's writes never change the
/// files.
///
/// No hole of a diff is mapped, so a raw diff keeps its holes, which mark its clean pages. On
/// tmpfs, touching a page where the full base has a hole allocates the page in the base's file. The
/// file then takes more memory and has fewer holes, with the same content.
///
/// The longest runs of pages are mapped, each from its own image. Short runs are copied when the
/// chain is mapped, because the number of mappings of a process is limited (`vm.max_map_count`,
/// 65,530 by default on Linux). A mapping of an older image continues under the runs of newer
/// images, except over holes of a diff, so a base takes one mapping.
///
/// Each run takes about 10 us, mapped or copied. This suits a chain whose diffs are clustered, or
/// few. While the chain is being mapped, 48 bytes are allocated for each copied run, and 16 bytes
/// for each run of data in a diff's file. [`copied`](Self::copied) shows whether a chain is too
/// scattered. The crate `lazy-restore` starts as fast on such a chain as on any other.
///
/// The files must not be truncated or written to while they are mapped: touching a page past the
/// end raises `SIGBUS`, and a page that was not touched yet changes with the file. Mapping a chain
/// fails if an image was [written to](Chain::check_unchanged) before. A commit may replace a file,
/// because the mapping keeps the old file. The chain may be dropped after it was mapped. No
/// descriptor stays open, so a chain may have any number of images.
///
/// # Discarded memory
/// **`madvise(MADV_DONTNEED)` on this memory does not make zeros: the bytes of the images return.**
/// A balloon device that discards pages like this corrupts the guest, which expects zeros or its
/// own bytes. Disable the balloon and free page reporting, or let them write zeros:
/// [`write_zeros`](Self::write_zeros), or a method of `GuestRam` that writes and marks. Zeros take
/// memory, so nothing is returned to the host. The crate `lazy-restore` starts a guest as fast, and
/// a balloon may discard its memory.
///
/// # As the RAM of a VMM
/// `GuestRam::from_owner` of the crate `guest-ram` takes the value, and keeps the memory mapped as
/// long as the RAM. The RAM begins with no marked page, except those that
/// [`write_zeros`](Self::write_zeros) has overwritten. Mark what was written by
/// [address](Self::as_ptr).
///
/// # Examples
/// ```
/// use memory_image::{Chain, MappedChain};
/// use page_reader::PageReader;
/// # let dir = tempfile::tempdir()?;
/// # let (full, diff) = (dir.path().join("full.mem"), dir.path().join("diff.mem"));
/// # std::fs::write(&full, vec![7; 1 << 20])?;
/// # std::fs::write(&diff, vec![8; 1 << 20])?;
///
/// let mut chain = Chain::open_raw(&full, 4096)?;
/// chain.push_pages(&diff, [65536..131072])?;
/// let ram = MappedChain::open(&chain)?;
/// println!("RAM of {} bytes at {:p}", ram.ram_size(), ram.as_ptr());
/// println!("{} bytes were copied", ram.copied());
/// let mut bytes = [0; 2];
/// ram.read_at(65535, &mut bytes)?; // the current bytes of a running guest
/// assert_eq!(bytes, [7, 8]);
///
/// let layout = page_reader::RamLayout::single(0, 1 << 20)?;
/// let ram: guest_ram::GuestRam = guest_ram::GuestRam::from_owner(layout, ram)?;
/// ram.write(0x1000, b"device")?; // the files do not change
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "the memory is unmapped when this is dropped"]
pub struct MappedChain {
    pub(super) ram: Region,
    pub(super) layout: Option<RamLayout>,
    id: Option<ImageId>,
    writes: HostWrites,
    mapped: u64,
    copied: u64,
}

/// Options for mapping a chain, created by [`MappedChain::options`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `map`"]
pub struct MappedChainOptions {
    max_mappings: usize,
}

impl MappedChain {
    /// Maps the chain, readable and writable.
    ///
    /// # Errors
    /// Returns a [`MapError`].
    pub fn open(chain: &Chain) -> Result<Self, MapError> {
        Self::options().map(chain)
    }

    /// Returns the default options.
    pub fn options() -> MappedChainOptions {
        MappedChainOptions {
            max_mappings: 16_384,
        }
    }

    /// Returns the address of the first byte, aligned to the host's page. It is valid for reads and
    /// writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ram.as_ptr()
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram.len() as u64
    }

    /// Returns the number of bytes of the RAM that are mapped from the images' files.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.mapped
    }

    /// Returns the number of bytes of the RAM that were copied. Bytes that were neither mapped nor
    /// copied are zeros.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied
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

impl MappedChainOptions {
    /// Sets the maximum number of the process's mappings that the RAM may take. The default is
    /// 16,384. With 1, everything is copied.
    pub fn max_mappings(mut self, mappings: usize) -> Self {
        self.max_mappings = mappings;
        self
    }

    /// Maps the chain, readable and writable.
    ///
    /// # Errors
    /// Returns a [`MapError`].
    pub fn map(&self, chain: &Chain) -> Result<MappedChain, MapError> {
        self.map_with(chain, &mut |_| ControlFlow::Continue(()))
    }

    /// Maps the chain like [`map`](Self::map), with a progress function. It is called before the
    /// first byte is copied and after each piece of at most 1 MiB. It may cancel.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map_with(
        &self,
        chain: &Chain,
        progress: &mut ProgressFn<'_>,
    ) -> Result<MappedChain, MapError> {
        chain.check_full()?;
        let (size, page) = (chain.ram_size(), host_page());
        let ram = Region::zeros(size).map_err(|source| MapError::Reserve { size, source })?;
        let plan = Plan::new(chain, page, self.max_mappings)?;
        let mut ram = plan.map_over(ram, chain, page)?;

        let (stored, copies) = plan.copies(chain, page);
        let copied = copies.iter().map(|copy| len(&copy.range)).sum();
        // Copying over mapped pages makes the kernel read them first. Disable reading of
        // neighboring pages.
        let advised =
            |advised: io::Result<()>| advised.map_err(|source| MapError::Reserve { size, source });
        advised(ram.read_single_pages(true))?;
        let mut done = 0;
        let report = &mut |bytes| {
            done += bytes;
            match progress(Progress::new(done, copied)).is_break() {
                true => Err(MapError::Cancelled),
                false => Ok(()),
            }
        };
        report(0)?;
        copy(chain, copies, &mut ram.as_target(size), report)?;
        advised(ram.read_single_pages(false))?;
        chain.check_unchanged()?;
        trace::mapped(stored - copied, copied);
        Ok(MappedChain {
            ram,
            layout: chain.ram_layout().cloned(),
            id: chain.id(),
            writes: HostWrites::default(),
            mapped: stored - copied,
            copied,
        })
    }
}

#[allow(unsafe_code)]
// SAFETY: as for `MappedImage`, for the files of all images.
unsafe impl RamOwner for MappedChain {
    fn image(&self) -> ParentImage {
        ParentImage::of_image(self.id.map(ImageId::to_bytes))
    }

    fn mark_writes(&self, bitmap: OwnerBitmap) {
        self.writes.mark_in(bitmap);
    }
}

/// Copies in file order, so that each file is opened once, independent of the limit of open files.
fn copy(
    chain: &Chain,
    mut copies: Vec<Copy>,
    ram: &mut HostRam<'_>,
    report: &mut dyn FnMut(u64) -> Result<(), MapError>,
) -> Result<(), MapError> {
    copies.sort_unstable_by_key(|copy| (copy.layer, copy.offset));
    for Copy {
        layer,
        offset,
        range,
    } in copies
    {
        for at in range.clone().step_by(READ_SIZE as usize) {
            let bytes = READ_SIZE.min(range.end - at) as usize;
            let image = chain.image(layer);
            let memory = ram.memory_mut(at, bytes);
            let mut memory = memory.expect("the run is inside the RAM");
            let read = memory.read_from(0..bytes, &*image.file()?, offset + (at - range.start));
            read.map_err(|(at, source)| image.read_error(at, source))?;
            report(bytes as u64)?;
        }
    }
    Ok(())
}
